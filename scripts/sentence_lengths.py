"""How long the sentences of Markdown pages are: mean, longest, and the share of more than 30 words.

python scripts/sentence_lengths.py [--limit WORDS] PAGE ...

Only prose counts: not code blocks, tables, headings, comments or link targets. A list item is a paragraph.
"""

import argparse
import re
import sys
from pathlib import Path

LONG = 30  # words
_END = re.compile(r"(?<=[.!?])[\"')*]*\s+(?=[\"'(*`\[A-Z0-9])")


def paragraphs(text: str) -> list[str]:
    """The prose of a page, without its markup."""
    text = re.sub(r"^(```|~~~).*?^\1", "\n\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^\s*(\||#|!\[|:::|!!!|<).*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*([-*]|\d+\.) +", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "Code", text)  # a command or a path is one word, and may begin a sentence
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def sentences(text: str) -> list[str]:
    """Those with a verb's worth of words: fewer than three words are labels."""
    parts = [part for paragraph in paragraphs(text) for part in _END.split(paragraph)]
    return [part for part in parts if len(part.split()) >= 3]


def mean(text: str) -> float:
    lengths = [len(sentence.split()) for sentence in sentences(text)]
    return sum(lengths) / len(lengths) if lengths else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--limit", type=float, help="exit 1 where a page's mean is above it")
    args = parser.parse_args()
    beyond = []
    for page in args.pages:
        text = page.read_text("utf-8")
        lengths = sorted(len(sentence.split()) for sentence in sentences(text)) or [0]
        share = sum(length > LONG for length in lengths) / len(lengths)
        print(f"{page}: {len(lengths)} sentences, mean {mean(text):.1f}, longest {lengths[-1]}, {share:.0%} > {LONG}")
        if args.limit is not None and mean(text) > args.limit:
            beyond.append(f"{page}: sentences of {mean(text):.1f} words on average; expected at most {args.limit:g}")
    if beyond:
        sys.exit("\n".join(beyond))


if __name__ == "__main__":
    main()
