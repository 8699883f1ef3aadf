"""The published list of a small world, and what becomes of each of its urls in two downloads."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field

from planted_certificates import EXPIRED, MISNAMED, SELF_SIGNED, TRUSTED
from planted_pictures import Encoded, jpeg, picture, png

NUM_SAMPLES, SHARD_SIZE, OUTAGE_SHARD = 240, 48, 3
ORDINARY = tuple(
    f"{name}.example" for name in ("cats", "dogs", "birds", "fish.zoo", "trees", "cars", "food", "www.museum")
)
PNG_HOST = "maps.example"
DEAD, VANISHED, CLOSING, DEAF, PLAIN_WEB = (
    f"{name}.example" for name in ("dead", "vanished", "closing", "deaf", "plainweb")
)
STOCK, HIJACKED = "stock.example", "hijacked.example"
HOST_SIZES = {DEAD: 6, VANISHED: 6, CLOSING: 6, DEAF: 3, STOCK: 8, HIJACKED: 10, PNG_HOST: 14}
TLS_SIZES = {PLAIN_WEB: 3, TRUSTED: 3, EXPIRED: 2, SELF_SIGNED: 2, MISNAMED: 2}
TLS_FAULTS = {
    PLAIN_WEB: "tls_plain",
    EXPIRED: "tls_expired",
    SELF_SIGNED: "tls_self_signed",
    MISNAMED: "tls_misnamed",
}
BAD_URLS = {
    "url_space": "http://cats.example/my cat.jpg",
    "url_no_scheme": "//dogs.example/1.jpg",
    "url_no_host": "http:///nobody.jpg",
    "url_not_ascii": "http://birds.example/vögel.jpg",
    "url_port": "http://trees.example:oak/1.jpg",
}

SLOW_FAULTS = {"timeout": 3, "timeout_body": 2}
FAULTS_A = {
    "http_404": 8, "http_410": 2, "http_403": 2, "http_403_robots": 3, "robots": 4, "http_401": 1, "http_429": 2,
    "http_500": 2, "http_503": 2, "redirect_loop": 1, "reset": 3, "cut": 2, "silent": 2, "corrupt": 4, "html": 3,
    "empty": 2, "bomb": 1, "too_small": 4, "too_large": 1, "too_long": 1,
}  # fmt: skip
FAULTS_B = {"http_404": 5, "http_410": 1, "robots": 2, "http_503": 3, "reset": 2, "corrupt": 2, "html": 2}
CONTENTS_A = {"rewrapped": 3, "recompressed": 4, "resized": 4, "different": 4}
CONTENTS_B = {"rewrapped": 2, "recompressed": 3, "resized": 3, "different": 3}
NUM_DEAD_TWICE = 3
"""Of the faults of the first download that are there in the second too."""


@dataclass(frozen=True)
class Sample:
    """One row of the published list, and the picture that was behind its url when it was published."""

    uid: str
    url: str
    text: str
    image: Encoded
    size: tuple[int, int]
    """(width, height)"""
    language: str
    scores: tuple[float, float]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.image).hexdigest()


@dataclass
class Fates:
    """What is planted for one download, by uid; a uid without an entry is fetched as it was published."""

    fault: dict[str, str] = field(default_factory=dict)
    content: dict[str, str] = field(default_factory=dict)
    """`rewrapped`, `recompressed`, `resized`, `different` or `placeholder`."""

    def arrives(self, uid: str) -> bool:
        return uid not in self.fault

    def content_of(self, uid: str) -> str:
        """`same` or what it is instead; empty when it does not arrive."""
        return self.content.get(uid, "same") if self.arrives(uid) else ""


def published_samples() -> list[Sample]:
    """The list, in its order; the same at every call."""
    rng = random.Random(7)
    urls = [f"http://{host}/{number}.jpg" for host, size in HOST_SIZES.items() for number in range(size)]
    urls += [f"https://{host}/{number}.jpg" for host, size in TLS_SIZES.items() for number in range(size)]
    urls += BAD_URLS.values()
    rest = NUM_SAMPLES - len(urls)
    urls += [f"http://{ORDINARY[number % len(ORDINARY)]}/pictures/{number}.jpg?size=large" for number in range(rest)]
    rng.shuffle(urls)
    slow = [url for url in urls if DEAF in url]
    urls = slow + [url for url in urls if url not in slow]  # what takes long is in the first shard, to wait once
    return [_sample(number, url, rng) for number, url in enumerate(urls)]


def _sample(number: int, url: str, rng: random.Random) -> Sample:
    image = picture(1 if number == 200 else number)  # two urls with one picture, which is no placeholder
    text = f"a drawing of number {number}"
    if number % 40 == 3:
        text = f'<script>alert("{number}")</script> & <b>bold</b> "quoted", naïve 图片\n\x1b[31m{number}'
    return Sample(
        uid=hashlib.md5(f"{number} {url}".encode()).hexdigest(),
        url=url,
        text=text,
        image=png(image) if PNG_HOST in url else jpeg(image),
        size=image.size,
        language=rng.choice(("en", "en", "en", "de", "zh")),
        scores=(round(rng.gauss(0.28, 0.04), 4), round(rng.gauss(0.22, 0.04), 4)),
    )


def planted_fates(samples: list[Sample]) -> tuple[Fates, Fates]:
    """What becomes of the samples in the first and in the second download."""
    rng = random.Random(11)
    a, b = Fates(), Fates()
    for fates in (a, b):
        _plant_hosts(samples, fates, TLS_FAULTS | {DEAF: "timeout_connect", VANISHED: "no_such_host"}, fates.fault)
        for fault, url in BAD_URLS.items():
            fates.fault.update({sample.uid: fault for sample in samples if sample.url == url})
    _plant_hosts(samples, a, {DEAD: "refused"}, a.fault)
    _plant_hosts(samples, b, {CLOSING: "refused"}, b.fault)
    _plant_hosts(samples, a, {STOCK: "placeholder"}, a.content)
    _plant_hosts(samples, b, {HIJACKED: "different"}, b.content)

    free = [sample.uid for sample in samples if host_of(sample.url) in ORDINARY and sample.url not in BAD_URLS.values()]
    early = [uid for uid in free if uid in {sample.uid for sample in samples[:SHARD_SIZE]}]
    for fates in (a, b):
        _plant(fates.fault, SLOW_FAULTS, early, rng)
    free = [uid for uid in free if uid not in a.fault and uid not in b.fault]
    for plan, place in ((FAULTS_A, a.fault), (CONTENTS_A, a.content), (CONTENTS_B, b.content), (FAULTS_B, b.fault)):
        _plant(place, plan, free, rng)
    lost = [uid for uid, fault in a.fault.items() if fault == "http_404"][:NUM_DEAD_TWICE]
    b.fault.update(dict.fromkeys(lost, "http_404"))
    outage = samples[OUTAGE_SHARD * SHARD_SIZE : (OUTAGE_SHARD + 1) * SHARD_SIZE]
    b.fault.update({sample.uid: "resolver" for sample in outage if b.fault.get(sample.uid, "") not in BAD_URLS})
    return a, b


def _plant_hosts(samples: list[Sample], fates: Fates, plan: dict[str, str], place: dict[str, str]) -> None:
    place.update({sample.uid: plan[host_of(sample.url)] for sample in samples if host_of(sample.url) in plan})


def _plant(place: dict[str, str], plan: dict[str, int], free: list[str], rng: random.Random) -> None:
    """Give each kind of `plan` to so many of the `free`, and take those out."""
    for kind, count in plan.items():
        for uid in rng.sample(free, count):
            place[uid] = kind
            free.remove(uid)


def host_of(url: str) -> str:
    """`cats.example` of `http://cats.example/1.jpg`."""
    return url.partition("//")[2].partition("/")[0]
