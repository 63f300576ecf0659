"""What tenants have under way in this process: how many uploads, their bytes, for how long, and whose turn it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from app.errors import AppError

AT_ONCE = 8  # of one tenant
SECONDS = 120  # for the whole body


class TooManyUploads(AppError):
    """Your tenant has as many uploads under way as it may."""

    status = 429
    code = "too_many_uploads"

    def __init__(self) -> None:
        super().__init__(headers={"Retry-After": "1"})


class UploadTooSlow(AppError):
    """The upload took longer than it may."""

    status = 408
    code = "upload_too_slow"

    def __init__(self) -> None:
        super().__init__(headers={"Connection": "close"})


@dataclass(slots=True, eq=False)
class Upload:
    """The bytes that one upload has in the staging folder."""

    size: int = 0


@dataclass(slots=True, weakref_slot=True, eq=False)
class UnderWay:
    """Of one tenant: its uploads, and the turn that each of its changes and walks waits for."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _uploads: list[Upload] = field(default_factory=list)

    @property
    def staged_bytes(self) -> int:
        return sum(upload.size for upload in self._uploads)

    @contextmanager
    def upload(self) -> Iterator[Upload]:
        """Raise TooManyUploads."""
        if len(self._uploads) >= AT_ONCE:
            raise TooManyUploads
        upload = Upload()
        self._uploads.append(upload)
        try:
            yield upload
        finally:
            self._uploads.remove(upload)


@asynccontextmanager
async def in_time() -> AsyncIterator[None]:
    """Raise UploadTooSlow where the block takes longer than an upload may."""
    deadline = asyncio.timeout(SECONDS)
    try:
        async with deadline:
            yield
    except TimeoutError:
        if deadline.expired():
            raise UploadTooSlow from None
        raise
