"""What a film holds besides its streams: tags, languages, flags, chapters. Kept where the container can.

What it could not hold is found by reading the result again, so that no list of each container's abilities is needed.
"""

from __future__ import annotations

from typing import Any

# Tags about the file as it was stored, which its writer sets anew.
_OF_STORAGE = (
    "encoder",
    "major_brand",
    "minor_version",
    "compatible_brands",
    "handler_name",
    "vendor_id",
    "alpha_mode",
    "duration",
    "_statistics",
    "bps",
    "number_of_",
    "variant_bitrate",
)
# FFmpeg's names of QuickTime's languages, where they differ from one of the two codes of ISO 639-2.
_PAIRS = (
    "fre:fra rum:ron cze:ces slo:slk deu:ger nld:dut ell:gre isl:ice zho:chi sqi:alb mkd:mac hye:arm kat:geo bod:tib "
    "mya:bur msa:may cym:wel eus:baq swe:sve"
)
_QUICKTIME_LANGUAGES = dict(pair.split(":") for pair in _PAIRS.split())
# What FFmpeg writes into the classic tags of MP4 and MOV. Other keys need the "mdta" tags, and then all become such.
_COMMON = {"title", "artist", "comment", "date", "genre", "copyright", "creation_time", "album", "encoder"}
_CLASSIC = {
    "mp4": _COMMON
    | {"album_artist", "composer", "grouping", "lyrics", "description", "synopsis", "show", "episode_id", "network"}
    | {"keywords", "season_number", "episode_sort", "media_type", "compilation", "track", "disc", "timecode"},
    "mov": _COMMON | {"make", "model", "location", "timecode"},
}
_QUICKTIME_LOCATION = "com.apple.quicktime.location.ISO6709"
_STRIPPED = ("language", "timecode")  # what --strip-metadata keeps of a stream


def kept_tags(tags: dict[str, str], *, strip: bool = False) -> dict[str, str]:
    """The tags of a file or stream that belong into the result."""
    kept = {}
    for key, value in tags.items():
        low = key.lower()
        if any(low == word or (word.endswith("_") and low.startswith(word)) for word in _OF_STORAGE):
            continue
        if low.startswith(("_statistics", "bps-", "duration-")) or (strip and low not in _STRIPPED):
            continue
        kept[key] = value
    return kept


def stream_tags(stream: Any, form: str, *, strip: bool) -> dict[str, str]:
    """The tags for the copy of a stream. form: FFmpeg's name of the output's container."""
    tags = kept_tags(stream.metadata, strip=strip)
    name = tags.pop("name", None)  # what MP4 and MOV call a stream's title
    if name is not None:
        tags.setdefault("title", name)
    if form == "mov" and "language" in tags:
        tags["language"] = _QUICKTIME_LANGUAGES.get(tags["language"], tags["language"])
    tags.pop("creation_time", None)  # writers take that of the file
    return tags


def container_tags(tags: dict[str, str], form: str, *, strip: bool) -> tuple[dict[str, str], dict[str, str]]:
    """The tags for the output, and the options of its muxer that keep them."""
    kept = kept_tags(tags, strip=strip)
    classic = _CLASSIC.get(form)
    if strip or classic is None or all(key.lower() in classic for key in kept):
        return kept, {}
    place = next((value for key, value in kept.items() if key.lower() == "location"), None)
    if place is not None:
        kept.setdefault(_QUICKTIME_LOCATION, place)
    return kept, {"movflags": "use_metadata_tags"}


def lost_tags(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
    """The keys of tags that were to be kept and are not there, or not whole."""
    have = {key.lower(): value for key, value in found.items()}
    if "location" not in have and _QUICKTIME_LOCATION.lower() in have:
        have["location"] = have[_QUICKTIME_LOCATION.lower()]
    if "name" in have:
        have.setdefault("title", have["name"])
    return [key for key, value in wanted.items() if have.get(key.lower(), "") != value and not _same(key, have, value)]


def _same(key: str, have: dict[str, str], value: str) -> bool:
    """Whether a tag says the same in other words: no language at all, or a time with another precision."""
    if key == "language":
        return value in ("und", "") or have.get(key) == _QUICKTIME_LANGUAGES.get(value)
    if key == "creation_time":
        return have.get(key, "")[:19] == value[:19]
    return False


def flags(stream: Any) -> set[str]:
    """The names of a stream's flags (dispositions), such as "default" and "forced"."""
    return {flag.name.lower() for flag in type(stream.disposition) if flag & stream.disposition and flag.name}
