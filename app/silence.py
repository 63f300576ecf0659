"""Says to libraries that they report to nobody, before any is imported. It needs none: the relay loads it as well."""

from __future__ import annotations

import os
from typing import Final

# mcp-use would send queries and answers to two hosts, langsmith traces: both decide when they are imported.
_SILENCED: Final = {
    "MCP_USE_ANONYMIZED_TELEMETRY": "false",
    "LANGSMITH_TRACING": "false",
    "LANGSMITH_TRACING_V2": "false",
    "LANGCHAIN_TRACING_V2": "false",
}
os.environ.update(_SILENCED)
# OpenTelemetry reads dozens of these on its own: where traces go, and what is in them, is said in the settings alone.
for _name in [name for name in os.environ if name.startswith("OTEL_")]:
    del os.environ[_name]


def libraries_are_silent() -> bool:
    """Whether that still holds, for what is imported now."""
    return all(os.environ.get(name) == value for name, value in _SILENCED.items())
