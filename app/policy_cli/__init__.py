"""`bulkhead policy`: a client of the HTTP API, for whoever writes a tenant's policies."""
