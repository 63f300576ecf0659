"""`bulkhead keys` and `bulkhead db dump|restore`: what an operator does to a database, and no service by itself."""
