"""Pictures of the documentation: the diagram of the nested format, and screenshots of reports in headless Chromium.

    python run.py search.average_bits=3 hydra.run.dir=outputs/pictures/job
    python run.py -m method=rtn,matgptq hydra.sweep.dir=outputs/pictures/sweep
    python docs/pictures.py outputs/pictures/job/report.html outputs/pictures/sweep/summary.html

Files are written to ``docs/images``.
"""

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).resolve().parent / "images"
WIDTH = 1000  # pixels
# Page of a screenshot, and its first and last row of pixels.
SHOTS = {"report": ("report", 0, 1180), "allocation": ("report", 1172, 2130), "sweep": ("summary", 0, 925)}
COLOURS = 64  # of its palette, which keeps a file small
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

CODES = (178, 77, 146, 19, 233, 120, 95, 204, 58, 161, 7, 182)  # any codes; the first one is followed through its cells
CELL = 26  # pixels of a bit in the diagram
READ, UNREAD, INK = "#4051b5", "#c5cae9", "#222222"


def rectangle(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="white"/>'


def text(x: float, y: float, words: str, fill: str = INK, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{fill}" text-anchor="{anchor}">{words}</text>'


def planes(left: int, top: int, bits: int) -> list[str]:
    """Codes as columns and planes as rows; a slice of ``bits`` bits reads the dark ones."""
    drawn = [text(left, top - 12, "Codes of 12 weights, a plane in each row")]
    for plane in range(8):
        y = top + plane * CELL
        drawn.append(text(left - 10, y + 18, f"plane {plane}", anchor="end"))
        for column, code in enumerate(CODES):
            bit = code >> (7 - plane) & 1
            read = plane < bits
            drawn.append(rectangle(left + column * CELL, y, CELL, CELL, READ if read else UNREAD))
            ink = "white" if read else INK
            drawn.append(text(left + (column + 0.5) * CELL, y + 18, str(bit), ink, "middle"))
    right = left + len(CODES) * CELL + 12
    drawn.append(text(right, top + bits * CELL / 2 + 5, f"a slice of {bits} bits reads these"))
    drawn.append(text(right, top + (bits + 8) * CELL / 2 + 5, "and not these"))
    return drawn


def cells(left: int, top: int, width: int, code: int) -> list[str]:
    """Cells of slices of 2, 3, 4 and 8 bits on the axis of the codes; those that hold a code are dark, with their centres."""
    drawn = [text(left, top - 12, f"Cells of the slices; the code {code:08b} lies in the dark ones")]
    for row, bits in enumerate((2, 3, 4, 8)):
        size, y = width / 2**bits, top + row * (CELL + 6)
        drawn.append(text(left - 10, y + 18, f"{bits} bits", anchor="end"))
        drawn.append(rectangle(left, y, width, CELL, UNREAD))
        own = code >> (8 - bits)
        for cell in range(2**bits):
            if cell == own or bits < 8:
                drawn.append(rectangle(left + cell * size, y, size, CELL, READ if cell == own else UNREAD))
            if cell == own and bits < 8:
                drawn.append(f'<circle cx="{left + (cell + 0.5) * size:g}" cy="{y + CELL / 2:g}" r="4" fill="white"/>')
    drawn.append(text(left, top + 4 * (CELL + 6) + 14, "The white point is the value that the slice gives the weight."))
    return drawn


def diagram() -> str:
    """Diagram of planes and cells, as SVG."""
    drawn = [*planes(90, 40, 3), *cells(90, 300, 640, CODES[0])]
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 460" font-family="sans-serif" font-size="14">'
    return "\n".join([head, '<rect width="760" height="460" rx="8" fill="white"/>', *drawn, "</svg>", ""])


def screenshot(page: Path, browser: str, top: int, bottom: int) -> Image.Image:
    """Rows of pixels of a page in a browser without a window."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--window-size={WIDTH},{bottom}",
        ]
        own = [f"--user-data-dir={folder}/profile", f"--screenshot={shot}", page.resolve().as_uri()]
        subprocess.run([browser, *flags, *own], check=True, capture_output=True, timeout=120)
        return Image.open(io.BytesIO(shot.read_bytes())).convert("RGB").crop((0, top, WIDTH, bottom))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, nargs="?", help="report.html of a job")
    parser.add_argument("summary", type=Path, nargs="?", help="summary.html of a sweep")
    arguments = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "nested_format.svg").write_text(diagram())
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    for name, (kind, top, bottom) in SHOTS.items():
        page = getattr(arguments, kind)
        if page is None:
            continue
        if browser is None:
            sys.exit(f"error: screenshots need one of {', '.join(BROWSERS)}, and none is installed.")
        screenshot(page, browser, top, bottom).quantize(COLOURS).save(IMAGES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
