"""Licences that bind what is made from weights: their texts go into the artifact, as they ask for.

A licence is known by the word that timm and the Hugging Face hub have for it. Of those whose text has to be passed on
the text comes with this package; the others are named in the manifest.
"""

from importlib import resources
from pathlib import Path

# To the name of the text's file, in `data/licences` and in the artifact, and what it asks of whoever passes it on.
TEXTS = {
    "dinov3-license": (
        "dinov3-license.md",
        "it binds this artifact too: whoever passes it on passes on the licence, whose text is in it, and some uses "
        "are excluded (https://ai.meta.com/resources/models-and-libraries/dinov3-license/)",
    ),
}
NON_COMMERCIAL = ("-nc", "noncommercial")


def words(licence: str) -> str:
    """The licence, and what it means for an artifact."""
    if licence in TEXTS:
        return f"{licence}; {TEXTS[licence][1]}"
    if any(mark in licence.lower() for mark in NON_COMMERCIAL):
        return f"{licence}; it excludes commercial use, of this artifact too"
    return licence


def write(licence: str | None, folder: Path) -> None:
    """Put the text of a licence that has to be passed on into an artifact's folder."""
    if licence in TEXTS:
        name = TEXTS[licence][0]
        text = (resources.files("convnext_deploy") / "data" / "licences" / name).read_bytes()
        (folder / name).write_bytes(text)
