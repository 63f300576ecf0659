"""Bulkhead: agents as a service, one watertight compartment a tenant."""

# First of all: it silences libraries that read the environment when they are imported.
from app import silence as silence

VERSION = "0.1.0"
