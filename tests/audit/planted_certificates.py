"""Certificates for the planted hosts: one that is trusted, and three kinds that are not."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

TRUSTED, EXPIRED, SELF_SIGNED, MISNAMED = (
    f"{name}.example" for name in ("secure", "expired", "selfsigned", "misnamed")
)
HOSTS = (TRUSTED, EXPIRED, SELF_SIGNED, MISNAMED)


def make_certificates(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's TLS by the name that a client asks for, and the file of certificates that clients should trust."""
    folder.mkdir(parents=True, exist_ok=True)
    contexts = {host: _context(folder, host) for host in HOSTS}
    front = contexts[TRUSTED]

    def choose(socket: ssl.SSLObject, host: str | None, _: ssl.SSLContext) -> None:
        socket.context = contexts.get(host or "", front)

    front.sni_callback = choose
    trusted = folder / "trusted.pem"
    trusted.write_bytes(b"".join((folder / f"{host}.pem").read_bytes() for host in HOSTS if host != SELF_SIGNED))
    return front, trusted


def _context(folder: Path, host: str) -> ssl.SSLContext:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    today = datetime.datetime.now(datetime.timezone.utc)
    days = (-30, -1) if host == EXPIRED else (-1, 30)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today + datetime.timedelta(days=days[0]))
        .not_valid_after(today + datetime.timedelta(days=days[1]))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("other.example" if host == MISNAMED else host)]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    chain, private = folder / f"{host}.pem", folder / f"{host}.key"
    chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, private)
    return context
