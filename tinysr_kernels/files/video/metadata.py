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
    "name",
)
# ISO 639-2/B and 639-2/T, which QuickTime knows.
_BOTH = (
    "alb:sqi arm:hye baq:eus bur:mya chi:zho cze:ces dut:nld fre:fra geo:kat ger:deu gre:ell ice:isl mac:mkd mao:mri "
    "may:msa per:fas rum:ron slo:slk tib:bod wel:cym"
)
_LANGUAGES = dict(pair.split(":") for pair in _BOTH.split())
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
    if form in ("mp4", "mov"):
        if "name" in stream.metadata and "title" not in tags and not strip:
            tags["title"] = stream.metadata["name"]
        if "language" in tags:
            tags["language"] = _LANGUAGES.get(tags["language"], tags["language"])
    return tags


def container_tags(tags: dict[str, str], form: str, *, strip: bool) -> tuple[dict[str, str], dict[str, str]]:
    """The tags for the output, and the options of its muxer that keep them."""
    kept = kept_tags(tags, strip=strip)
    classic = _CLASSIC.get(form)
    if strip or classic is None or all(key.lower() in classic for key in kept):
        return kept, {}
    if "location" in kept:
        kept.setdefault(_QUICKTIME_LOCATION, kept["location"])
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
        return value in ("und", "") or have.get(key) == _LANGUAGES.get(value)
    if key == "creation_time":
        return have.get(key, "")[:19] == value[:19]
    return False


def flags(stream: Any) -> set[str]:
    """The names of a stream's flags (dispositions), such as "default" and "forced"."""
    return {flag.name.lower() for flag in type(stream.disposition) if flag & stream.disposition and flag.name}
