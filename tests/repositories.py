"""Git repositories for the tests, and the certificate of a Git host."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.support import run

WHO = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "init.defaultBranch=main")


@dataclass(frozen=True)
class Repository:
    """A bare repository, as a Git host has it, and a clone to commit in."""

    bare: Path
    clone: Path

    @staticmethod
    def make(bare: Path) -> Repository:
        made = Repository(bare, bare.with_name(f"{bare.name}.clone"))
        _git("init", "--quiet", "--bare", str(bare))
        _git("clone", "--quiet", str(bare), str(made.clone))
        # A branch of that name there is, whatever this host's git calls its first one.
        _git("-C", str(made.clone), "checkout", "--quiet", "-B", "main")
        return made

    def commit(self, path: str, text: str, *, branch: str = "main") -> str:
        """Writes a file, commits and pushes it; returns the commit."""
        (self.clone / path).parent.mkdir(parents=True, exist_ok=True)
        (self.clone / path).write_text(text, encoding="utf-8")
        _git("-C", str(self.clone), "add", "--all")
        _git("-C", str(self.clone), "commit", "--quiet", "--message", f"Change {path}")
        _git("-C", str(self.clone), "push", "--quiet", "origin", f"HEAD:refs/heads/{branch}")
        return _git("-C", str(self.clone), "rev-parse", "HEAD").strip()


def _git(*words: str) -> str:
    # Without what whoever tests has set for themselves: signatures, hooks.
    done = run("env", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "git", *WHO, *words)
    assert done.code == 0, done.output
    return done.output


def certificate(path: Path, host: str) -> None:
    """Writes a certificate that its own key has signed, for a host's name, and that key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(serialization.Encoding.PEM)
    )
