"""Why a listed sample is missing: img2dataset's statuses and errors as a few classes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Reason:
    """A class of losses."""

    name: str
    words: str
    pattern: str = ""
    """Of error messages in small letters; empty for classes that no message tells."""
    is_passing: bool = False
    """Whether asking once more may help."""
    reached: bool = False
    """Whether such an error proves that the host's name was resolved."""


# The first that matches decides. Messages of img2dataset 1.47, of Python's urllib below it and of OpenSSL.
_TOLD = (
    # First, because these quote the address, in which any other word may stand.
    Reason(
        "bad_url",
        "the address is no url",
        "^unknown url type|error unknown url type|no host given|^nonnumeric port|control characters|codec can|idna",
    ),
    Reason("opted_out", "the site forbids the use (X-Robots-Tag)", "x-robots-tag|disallowed", reached=True),
    Reason("not_found", "gone (404, 410)", "http error (404|410)", reached=True),
    Reason("forbidden", "refused (401, 402, 403, 451)", "http error (401|402|403|451)", reached=True),
    Reason("rate_limited", "too many requests (429)", "http error 429", is_passing=True, reached=True),
    Reason("server_error", "the server failed (5xx)", "http error 5", is_passing=True, reached=True),
    Reason("timeout", "no answer in time", "http error 408|timed out", is_passing=True),
    Reason("bad_request", "another answer than a picture (other HTTP status)", "http error", reached=True),
    Reason(
        "tls",
        "certificate or encryption failed",
        "ssl|certificate|violation of protocol",
        is_passing=True,
        reached=True,
    ),
    Reason(
        "resolver",
        "the resolver failed, or knew the host's name at other times",
        "temporary failure in name|failure in name resolution|errno -3[]]|errno -4[]]",
        is_passing=True,
    ),
    Reason(
        "dns",
        "the host's name is not known",
        "name or service not known|nodename nor servname|no address assoc|errno -2[]]",
    ),
    Reason(
        "local_fault",
        "the downloading machine ran out of something",
        "too many open files|start new thread|resource busy|no space left|cannot allocate|cannot assign requested",
        is_passing=True,
    ),
    Reason(
        "dead_host",
        "the host takes no connection",
        "connection refused|no route to host|unreachable|host is down",
        is_passing=True,
        reached=True,
    ),
    Reason(
        "reset",
        "the connection broke",
        "connection reset|remote end closed|incompleteread|connection aborted|broken pipe|badstatusline",
        is_passing=True,
        reached=True,
    ),
    Reason("hash_mismatch", "its bytes are not the published ones", "hash mismatch", reached=True),
    Reason("too_small", "the picture is too small", "image too small", reached=True),
    Reason("bad_shape", "the picture's shape is not wanted", "aspect ratio|area too large", reached=True),
    Reason("not_decoded", "no picture that can be decoded", "decoding|opencv|cannot identify", reached=True),
)
_DEDUCED = (
    Reason("other", "another error", is_passing=True),
    Reason("never_attempted", "nobody tried to download it", is_passing=True),
    Reason("damaged_shard", "downloaded into a shard that is now damaged", is_passing=True),
    Reason("lost_from_tars", "downloaded, but not in the tars", is_passing=True),
)
_PATTERNS = [(reason, re.compile(reason.pattern)) for reason in _TOLD]
REASONS = {reason.name: reason for reason in (*_TOLD, *_DEDUCED)}


@lru_cache(maxsize=4096)  # the texts of a million failures are few
def reason_of(status: str | None, message: str | None) -> str:
    """The class of an attempt; `success` for one that has none.

    A picture that img2dataset could not decode or did not want has the status failed_to_resize.
    """
    if status == "success":
        return "success"
    text = (message or "").lower()
    found = next((reason.name for reason, pattern in _PATTERNS if pattern.search(text)), None)
    return found or ("not_decoded" if status == "failed_to_resize" else "other")


def hosts_reached(attempts: Any) -> Any:
    """Hosts whose name was resolved in at least one attempt of a table with `host` and `reason`: a column `host`."""
    proof = ["success", *(name for name, reason in REASONS.items() if reason.reached)]
    return attempts.filter(attempts.reason.isin(proof) & (attempts.host != "")).select("host").distinct()


def with_resolver_failures(attempts: Any, reached: Any) -> Any:
    """`attempts` with `dns` turned into `resolver` where the host is among those `reached`."""
    import ibis

    failed = (attempts.reason == "dns") & attempts.host.isin(reached.host)
    return attempts.mutate(reason=ibis.cases((failed, "resolver"), else_=attempts.reason))
