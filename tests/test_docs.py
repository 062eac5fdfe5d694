"""What the documentation says is what the result files hold."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("no benchmarks in this distribution", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

import docs  # noqa: E402  (benchmarks is no package: its folder must be on the path first)
from pages import drawn, tables  # noqa: E402

LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def test_committed_tables_and_cards_are_those_of_the_result_files():
    outdated = [str(path.relative_to(ROOT)) for path, text in docs.generated() if path.read_text("utf-8") != text]
    assert not outdated, "run `make docs`"


def test_committed_plots_are_drawn_from_the_result_files():
    assert not drawn.outdated(ROOT / "docs"), "run `make docs`"


def test_a_plot_is_outdated_when_a_number_of_its_result_file_changes(tmp_path):
    for name in {name for names in drawn.SOURCES.values() for name in names}:
        shutil.copy(drawn.RESULTS / f"{name}.json", tmp_path)
    assert not drawn.outdated(ROOT / "docs", tmp_path)
    file = tmp_path / "lengths-smollm2-135m-cpu.json"
    found = json.loads(file.read_text("utf-8"))
    found["rows"][0]["decode_ms"] += 1
    file.write_text(json.dumps(found), "utf-8")
    assert [path.stem for path in drawn.outdated(ROOT / "docs", tmp_path)] == ["cost-by-length"]


def test_every_plot_that_a_page_shows_is_checked():
    text = "".join(page.read_text("utf-8") for page in docs.pages())
    shown = {Path(link).stem for link in re.findall(r"!\[.*?\]\((\S+\.svg)\)", text)}
    assert shown - {"token-flow"} == set(drawn.SOURCES)  # token-flow is drawn by hand and has no numbers


SETTINGS = "aim of 1.5 times", "aim of 1.1 times", "at most 512 MB", "at most 5%", "larger by 0.01"
NOT_PROSE = re.compile(r"<!-- table: .*?<!-- end -->|```.*?```|`[^`]*`|\]\([^)]*\)", re.DOTALL)
VERSION = re.compile(r"(Qwen|triton |torch |arXiv )[\d.]+|\b[01]\.5B")
MEASURED = re.compile(r"\d\.\d|\d ?%|\d (?:ms|s|us|tokens/s|times|points|nats|GB|GiB|MB)\b")


@pytest.mark.parametrize("page", ["performance", "recall", "results", "store"])
def test_prose_outside_of_generated_blocks_states_no_measured_number(page):
    prose = VERSION.sub("", NOT_PROSE.sub("", (ROOT / "docs" / f"{page}.md").read_text("utf-8")))
    for setting in SETTINGS:
        prose = " ".join(prose.split()).replace(setting, "")
    assert not [prose[max(0, found.start() - 40) : found.end() + 10] for found in MEASURED.finditer(prose)]


def test_every_table_stands_in_a_page():
    shown = [name for page in docs.pages() for name, _ in docs.MARKED.findall(page.read_text("utf-8"))]
    assert sorted(set(shown)) == sorted(tables.TABLES)


def test_a_page_is_made_again_from_its_markers():
    page = "before\n<!-- table: cpu-load -->\nold\n<!-- end -->\nbehind\n"
    made = docs.rewritten(page)
    assert made.startswith("before\n<!-- table: cpu-load -->\n| ") and made.endswith("\n<!-- end -->\nbehind\n")
    assert "old" not in made and docs.rewritten(made) == made
    with pytest.raises(KeyError, match="nothing"):
        docs.rewritten("<!-- table: nothing -->\n<!-- end -->")


def test_a_cell_holds_one_number():
    number = r"[+-]?\d[\d,]*(?:\.\d+)?%?"
    for name in tables.TABLES:
        for line in tables.make(name).splitlines():
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")[1:]] if line.startswith("|") else []
            assert not [cell for cell in cells if re.fullmatch(rf"{number}[\s/(\[-]+{number}.*", cell)], (name, line)


@pytest.mark.parametrize("page", [*docs.pages(), *sorted((ROOT / "docs" / "log").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    missing = [link for link in LINK.findall(page.read_text("utf-8")) if not (page.parent / link).exists()]
    assert not missing


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
