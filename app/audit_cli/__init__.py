"""`bulkhead audit`: works on the database or on exported files, with no service."""
