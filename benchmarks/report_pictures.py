"""The pictures of docs/report.md: parts of a report, as a browser shows them.

    python benchmarks/report_pictures.py REPORT [--run 3] [--output docs] [--browser /usr/bin/chromium]

Written: ``report_answer.png``, the first section with the chart that compares methods; ``report_layers.png``, which
layers the run with that number changed, and what it forgot.
"""

import argparse
from pathlib import Path

from playwright.sync_api import Locator, Page, sync_playwright

MARGIN = 12


def main() -> None:
    """Open the report and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--run", default="0")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--browser", default="/usr/bin/chromium")
    args = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.browser, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.goto(args.report.resolve().as_uri())
        page.wait_for_timeout(1500)
        answer = [page.locator("section[aria-labelledby=answer]"), page.locator("figure:has(#difference)")]
        picture(page, answer, args.output / "report_answer.png")
        if page.locator("#run").count():
            page.select_option("#run", args.run)
            page.wait_for_timeout(1500)
        parts = [page.locator(f"section[aria-labelledby={name}-{args.run}]") for name in ("layers-of", "forgot")]
        picture(page, parts, args.output / "report_layers.png")
        browser.close()


def picture(page: Page, parts: list[Locator], file: Path) -> None:
    """What lies between the first and the last of some parts of a page."""
    boxes = [box for part in parts if (box := part.bounding_box()) is not None]
    top = min(box["y"] for box in boxes)
    bottom = max(box["y"] + box["height"] for box in boxes)
    size = page.viewport_size
    assert size is not None
    clip = {"x": 0, "y": top, "width": size["width"], "height": bottom - top + MARGIN}
    page.screenshot(path=file, clip=clip, full_page=True)  # type: ignore[arg-type]
    print(file)


if __name__ == "__main__":
    main()
