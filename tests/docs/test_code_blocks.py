"""Code blocks of README.md and of the pages under docs/: each is run, or parsed where a comment says why it is not run."""

import pytest
from doc_blocks import ROOT, check_block, pages, read_blocks, run_block


SHIPPED_PAGES = ("README.md", "quickstart.md")  # with the shipped cascade; the others with a narrow one
PAGES = [page for page in pages() if read_blocks(page)]


@pytest.mark.parametrize(
    "page, workplace",
    [(page, page.name in SHIPPED_PAGES) for page in PAGES],
    ids=[str(page.relative_to(ROOT)) for page in PAGES],
    indirect=["workplace"],
)
def test_the_code_runs(page, workplace, request):
    if page.name == "deepfloyd.md":
        request.getfixturevalue("deepfloyd")
    names: dict = {"__name__": page.stem.replace("-", "_")}
    for block in read_blocks(page):
        try:
            check_block(block)
            if block.not_run is None:
                run_block(block, names)
        except BaseException as error:
            error.add_note(f"in the block of {block.place}")
            raise
