"""The pictures of the course, one a lesson, in English and in Chinese.

    python docs/course/drawings.py                  # all, into docs/images/course
    python docs/course/drawings.py optimizers lora  # those of two lessons

A picture shows what a formula says, and what the experiment has printed: its numbers are read from the lesson's page,
so page and picture agree. The drawing functions are in docs/course/pictures.
"""

import argparse
import inspect
from pathlib import Path

import lesson

try:
    from pictures import canvas, model, tuning
except ImportError as problem:
    raise SystemExit(f'drawing needs matplotlib ({problem}): pip install -e ".[plot]"') from None

from minillm.base.errors import UserError

LESSONS = {**model.LESSONS, **tuning.LESSONS}  # name → function that draws


def main() -> None:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lessons", nargs="*", metavar="LESSON", help=f"all, or some of {', '.join(LESSONS)}")
    parser.add_argument("--out", type=Path, default=canvas.IMAGES, help="folder of the pictures (%(default)s)")
    chosen = parser.parse_args()
    if unknown := set(chosen.lessons) - set(LESSONS):
        raise UserError(f"{', '.join(sorted(unknown))}: no such lesson; there are {', '.join(LESSONS)}")
    for name in chosen.lessons or LESSONS:
        for language in ("en", "zh"):
            print(canvas.draw(LESSONS[name], language, chosen.out), flush=True)


if __name__ == "__main__":
    lesson.run(main)
