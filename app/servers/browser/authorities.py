"""Makes a browser trust the operator's authorities, then becomes the program that is named. It runs inside.

    python -I /srv/authorities.py /srv/ca.pem /tmp/.pki/nssdb program [argument ...]

The browser takes additional authorities from a database of NSS alone, so NSS, which the browser brings along, makes it.
"""

from __future__ import annotations

import ctypes
import os
import ssl
import sys
from pathlib import Path
from typing import Final

# CERTDB_VALID_CA, CERTDB_TRUSTED_CA: to vouch for servers, and for neither mail nor programs.
TRUSTED: Final = 0x08 | 0x10
END: Final = "-----END CERTIFICATE-----"


class Item(ctypes.Structure):
    """SECItem"""

    _fields_ = (("type", ctypes.c_int), ("data", ctypes.c_char_p), ("len", ctypes.c_uint))


class Trust(ctypes.Structure):
    """CERTCertTrust"""

    _fields_ = (("ssl", ctypes.c_uint), ("email", ctypes.c_uint), ("objects", ctypes.c_uint))


class Store:
    """A new database in an empty folder, without a password: nothing in it is secret."""

    def __init__(self, folder: Path) -> None:
        self._nss = ctypes.CDLL("libnss3.so")
        for name in ("PK11_GetInternalKeySlot", "CERT_GetDefaultCertDB", "CERT_NewTempCertificate"):
            getattr(self._nss, name).restype = ctypes.c_void_p
        self._check("open", self._nss.NSS_InitReadWrite(f"sql:{folder}".encode()))
        self._slot = ctypes.c_void_p(self._nss.PK11_GetInternalKeySlot())
        self._database = ctypes.c_void_p(self._nss.CERT_GetDefaultCertDB())
        self._check("begin", self._nss.PK11_InitPin(self._slot, None, None))

    def trust(self, der: bytes, name: bytes) -> None:
        read = self._nss.CERT_NewTempCertificate(
            self._database, ctypes.byref(Item(0, der, len(der))), None, ctypes.c_int(0), ctypes.c_int(1)
        )
        self._check("read", 0 if read else -1)
        certificate = ctypes.c_void_p(read)
        kept = self._nss.PK11_ImportCert(self._slot, certificate, ctypes.c_ulong(0), name, ctypes.c_int(0))
        self._check("keep", kept)
        trust = ctypes.byref(Trust(TRUSTED, 0, 0))
        self._check("trust", self._nss.CERT_ChangeCertTrust(self._database, certificate, trust))

    def close(self) -> None:
        self._nss.NSS_Shutdown()

    def _check(self, what: str, status: int) -> None:
        if status != 0:
            sys.exit(f"the operator's authorities: cannot {what}: {self._nss.PORT_GetError()}")


def main() -> None:
    bundle, folder, *program = sys.argv[1:]
    Path(folder).mkdir(parents=True)
    store = Store(Path(folder))
    for number, text in enumerate(Path(bundle).read_text().split(END)[:-1]):
        pem = text[text.index("-----BEGIN CERTIFICATE-----") :] + END
        store.trust(ssl.PEM_cert_to_DER_cert(pem), b"operator-%d" % number)
    store.close()
    os.environ.pop("LD_LIBRARY_PATH", None)  # that of this interpreter
    os.execv(program[0], program)  # noqa: S606  a list, and no shell


if __name__ == "__main__":
    main()
