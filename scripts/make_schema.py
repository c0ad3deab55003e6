"""Write the JSON schema of `manifest.json` from the record itself, or check that the written one is current.

python scripts/make_schema.py [--check] docs/manifest.schema.json
"""

import argparse
import sys
from pathlib import Path

import msgspec

from convnext_deploy.records.manifest import Manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the file is stale")
    args = parser.parse_args()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(Manifest)}
    text = msgspec.json.format(msgspec.json.encode(schema), indent=2).decode() + "\n"
    if not args.check:
        args.path.write_text(text)
    elif not args.path.is_file() or args.path.read_text() != text:
        sys.exit(f"{args.path} is stale; run: make schema")


if __name__ == "__main__":
    main()
