#!/usr/bin/env python
"""Rewrites the tables of docs/*.md and of this folder's pages that come from the runs in this folder.

docs/evidence/tables.py [--check]

A page says where: `<!-- table NAME -->`, then the table, then an empty line. --check writes nothing and fails where a
table is not that of the runs.
"""

import argparse
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path

import cifar10_equal_fit
import cifar10_tables
import fine_tuning_report
import modern
import remedies

DOCS = Path(__file__).resolve().parents[1]
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("evidence/*.md")])
TABLE = re.compile(r"(<!-- table ([\w-]+) -->\n\n).*?\n(?=\n)", re.S)


study = functools.cache(cifar10_tables.Study)


def of_cifar(table: Callable[[cifar10_tables.Study], str]) -> Callable[[], str]:
    return lambda: table(study())


@functools.cache
def remedy_study() -> remedies.Study:
    return remedies.Study(study().digest)


def of_transfer() -> str:
    import transfer  # with Detectron2, which no other table needs

    return transfer.Study().table()


TABLES: dict[str, Callable[[], str]] = {
    "cifar10-summary": of_cifar(cifar10_tables.summary),
    "cifar10-whole": of_cifar(cifar10_tables.whole),
    "cifar10-medium": of_cifar(cifar10_tables.medium),
    "cifar10-ablations": of_cifar(cifar10_tables.ablations),
    "cifar10-released": of_cifar(cifar10_tables.released),
    "cifar10-planted": of_cifar(cifar10_tables.planted),
    "cifar10-by-itself": of_cifar(cifar10_tables.by_itself),
    "cifar10-equal-fit": lambda: cifar10_equal_fit.table(cifar10_equal_fit.runs()),
    "fine-tuning-summary": fine_tuning_report.summary,
    "fine-tuning": fine_tuning_report.table,
    "fine-tuning-forms": fine_tuning_report.forms,
    **{f"remedies-{name}": lambda name=name: remedies.table(remedy_study(), name) for name in remedies.STUDIES},
    "remedies-verdicts": lambda: remedies.verdicts(remedy_study()),
    "remedies-widened-fresh": lambda: remedies.table(remedy_study(), "widened", remedies.FRESH),
    "remedies-widened-fresh-verdicts": lambda: remedies.verdicts(remedy_study(), ["widened"], remedies.FRESH),
    "remedies-widened-second": lambda: remedies.verdicts(remedy_study(), ["widened"], remedies.SECOND, remedies.TWO),
    **{name.replace("_", "-"): lambda study=study: study().table() for name, study in modern.STUDIES.items()},
    "transfer": of_transfer,
}


def renewed(text: str) -> str:
    """The page with the tables of the runs. Raises KeyError for a table that is not known."""
    return TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    old = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := renewed(text)) != text:
            old.append(page.name)
            if not check:
                page.write_text(new, encoding="utf-8")
    if old:
        print(f"{'out of date' if check else 'rewritten'}: {', '.join(old)}")
    sys.exit(check and bool(old))


if __name__ == "__main__":
    main()
