"""Draw docs/routing.svg: one training step of spot-adaptive distillation, with two spots.

    python docs/draw_routing.py            # writes docs/routing.svg
    python docs/draw_routing.py FILE.png   # or another file, in the format of its ending

The same Matplotlib draws the same bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

# What a part is trained by, as (fill, outline). The colours are those of Okabe and Ito, 2008, made lighter for fills.
FROZEN = ("#E9EBEE", "#6B7280")
STUDENT_LOSS = ("#FBDCC4", "#D55E00")
ROUTING_LOSS = ("#C4EADD", "#007A59")
INK = "#1F2328"

SIZE = (126, 85)  # of the canvas; 11 units are an inch
STAGE_1, SPOT_1, STAGE_2, SPOT_2, STAGE_3 = 20, 33, 46, 59, 72
POOLED, CLASSIFIER, LOGITS = 81.5, 95, 107


class Canvas:
    """Boxes, gates and arrows at positions given in canvas units."""

    def __init__(self):
        self.figure = Figure(figsize=(SIZE[0] / 11, SIZE[1] / 11), facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, SIZE[0]), ylim=(0, SIZE[1]))
        self.axes.axis("off")

    def text(self, x: float, y: float, text: str, size: float = 11, color: str = INK, **style) -> None:
        style = {"ha": "center", "va": "center", "zorder": 6} | style
        self.axes.text(x, y, text, size=size, color=color, **style)

    def box(self, x: float, y: float, text: str, kind: tuple[str, str], width: float = 11, **style) -> None:
        height = style.pop("height", 5.2)
        corner = (x - width / 2, y - height / 2)
        shape = "round,pad=0,rounding_size=0.8"
        self.axes.add_patch(
            FancyBboxPatch(corner, width, height, shape, fc=kind[0], ec=kind[1], lw=1.5, zorder=4, **style)
        )
        self.text(x, y, text)

    def gate(self, x: float, y: float, text: str) -> None:
        self.axes.add_patch(Circle((x, y), 2.1, fc="white", ec=ROUTING_LOSS[1], lw=2, zorder=5))
        self.text(x, y, text, color=ROUTING_LOSS[1])

    def dot(self, x: float, y: float) -> None:
        self.axes.add_patch(Circle((x, y), 0.55, fc=INK, ec=INK, zorder=5))

    def arrow(self, start: tuple[float, float], end: tuple[float, float], color: str = INK, **style) -> None:
        style = {"arrowstyle": "-|>", "mutation_scale": 13, "lw": 1.5, "zorder": 3} | style
        self.axes.add_patch(FancyArrowPatch(start, end, color=color, shrinkA=0, shrinkB=0, **style))

    def line(self, *points: tuple[float, float], color: str = INK, **style) -> None:
        style = {"lw": 1.5, "zorder": 2} | style
        self.axes.plot(*zip(*points), color=color, solid_capstyle="butt", **style)


def draw() -> Figure:
    canvas = Canvas()
    draw_distillation(canvas, teacher=73, student=54)
    draw_routing(canvas, teacher=32, student=15)
    draw_legend(canvas, y=2.4)
    return canvas.figure


def draw_distillation(canvas: Canvas, teacher: float, student: float) -> None:
    """The student's step: every spot, and the logits, has a gate between teacher and student."""
    middle = (teacher + student) / 2
    heading(canvas, teacher + 8, "1   The student learns from the label, and from the teacher where a gate is 1")
    canvas.box(6, middle, "image $x$", ("white", INK), width=8.6)
    canvas.line((10.3, middle), (11.5, middle))
    canvas.line((11.5, student - 0.08), (11.5, teacher + 0.08))
    for y, name, kind in ((teacher, "teacher", FROZEN), (student, "student", STUDENT_LOSS)):
        canvas.text(STAGE_1 - 5.5, y + 4.2, name, ha="left", weight="bold")
        canvas.line((11.5, y), (LOGITS, y))
        for x, stage in ((STAGE_1, "stage 1"), (STAGE_2, "stage 2"), (STAGE_3, "stage 3"), (CLASSIFIER, "classifier")):
            canvas.box(x, y, stage, kind)
    draw_policy(canvas, middle, teacher, student)
    spots = (
        (SPOT_1, "spot 1", "$a_1$", "$L_1$"),
        (SPOT_2, "spot 2", "$a_2$", "$L_2$"),
        (LOGITS, "logits", "$a_z$", "KL"),
    )
    for x, place, gate, loss in spots:
        canvas.text(x, teacher + 2.4, place, size=10)
        canvas.dot(x, teacher)
        canvas.line((x, teacher), (x, middle), color=STUDENT_LOSS[1], lw=2)
        canvas.arrow((x, middle), (x, student + 0.1), color=STUDENT_LOSS[1], lw=2)
        canvas.gate(x, middle, gate)
        canvas.text(x + 1.2, middle + 5, loss, size=12, color=STUDENT_LOSS[1], ha="left")
    canvas.arrow((LOGITS, student), (LOGITS + 6.5, student))
    canvas.text(LOGITS + 7.4, student, "CE with\nlabel $y$", ha="left")
    canvas.text(
        SIZE[0] / 2,
        student - 6.6,
        r"$L\;=\;\mathrm{CE}\;+\;\beta\,\sum_k\,a_k\,L_k\;+\;\alpha\,a_z\,\mathrm{KL}$"
        "     trains the student and the distiller's own modules",
        size=12,
        color=STUDENT_LOSS[1],
    )


def draw_policy(canvas: Canvas, y: float, teacher: float, student: float) -> None:
    """It looks at both pooled vectors and sets all gates."""
    canvas.box(POOLED, y, "policy", ROUTING_LOSS, width=9.5)
    for lane, edge in ((teacher, y + 2.6), (student, y - 2.6)):
        canvas.dot(POOLED, lane)
        canvas.arrow((POOLED, lane), (POOLED, edge))
        canvas.text(POOLED + 1, (lane + edge) / 2, "pooled\nvector", size=10, ha="left")
    canvas.line((SPOT_1, y), (LOGITS, y), color=ROUTING_LOSS[1], ls=(0, (4, 2)))
    canvas.text(STAGE_3 - 3, y + 1.6, "gates", size=10, color=ROUTING_LOSS[1])


def draw_routing(canvas: Canvas, teacher: float, student: float) -> None:
    """The policy's step: at every spot, each sample goes on from the feature of one network, in both of them."""
    middle = (teacher + student) / 2
    heading(canvas, teacher + 7.6, "2   The policy learns from the label, through a network made of both")
    canvas.text(STAGE_1 - 5.5, teacher + 4.2, "teacher", ha="left", weight="bold")
    canvas.text(STAGE_1 - 5.5, student - 4.2, "student, a frozen copy", ha="left", weight="bold")
    canvas.box(6, student, "image $x$", ("white", INK), width=8.6)
    canvas.line((10.3, student), (STAGE_1, student))
    canvas.box(STAGE_1, student, "stage 1", FROZEN)
    canvas.box(STAGE_1, teacher, "its feature\nfrom step 1", FROZEN, ls=(0, (3, 2)))
    end = LOGITS - 3
    for y, edge in ((teacher, middle + 2.1), (student, middle - 2.1)):
        canvas.line((STAGE_1, y), (end, y))
        canvas.box(STAGE_2, y, "stage 2", FROZEN)
        canvas.box(STAGE_3 + 8, y, "stage 3, pooling, classifier", FROZEN, width=27)
        canvas.arrow((end, y), (end, edge))
    for x, k in ((SPOT_1, 1), (SPOT_2, 2)):
        draw_crossing(canvas, x, k, teacher, student)
    canvas.gate(end, middle, "$a_z$")
    canvas.arrow((end + 2.1, middle), (end + 9, middle))
    canvas.text(end + 5, middle + 1.6, "logits $z$", size=10)
    canvas.text(end + 9.9, middle, "CE of $z$\nwith label $y$", ha="left")
    explanation = (
        "$a_k$ = 1: both networks go on from the teacher's feature; the student takes it through the adapter $g_k$",
        "$a_k$ = 0: both networks go on from the student's feature; the teacher takes it through the adapter $h_k$",
    )
    for line, text in enumerate(explanation):
        canvas.text(STAGE_2 - 5.5, student - 4.4 - 2.4 * line, text, size=10.5, ha="left", color=ROUTING_LOSS[1])


def draw_crossing(canvas: Canvas, x: float, k: int, teacher: float, student: float) -> None:
    """Adapters in both directions, and a gate on each side."""
    out, back = x - 5, x + 4.7
    for here, there, name in ((teacher, student, f"$g_{k}$"), (student, teacher, f"$h_{k}$")):
        canvas.dot(out, here)
        canvas.arrow((out, here), (back - 2.1, here))
        canvas.gate(back, here, f"$a_{k}$")
        canvas.arrow((out, here), (back - 1.1, there + 1.8 * (1 if here > there else -1)), color=ROUTING_LOSS[1])
        share = 0.3  # of the way, where the adapter stands
        canvas.box(out + share * (back - out), here + share * (there - here), name, ROUTING_LOSS, width=4.4, height=3.8)


def draw_legend(canvas: Canvas, y: float) -> None:
    entries = (
        (FROZEN, "frozen"),
        (STUDENT_LOSS, r"trained by the student's loss $L$"),
        (ROUTING_LOSS, r"trained by the routing loss $L_\mathrm{policy}$"),
    )
    for x, (kind, text) in zip((20, 36, 70), entries):
        canvas.box(x, y, "", kind, width=3.4, height=2.2)
        canvas.text(x + 2.6, y, text, ha="left", size=10.5)


def heading(canvas: Canvas, y: float, text: str) -> None:
    canvas.text(2, y, text, ha="left", size=13, weight="bold")


def main(file: Path) -> None:
    # Text becomes outlines, so that it looks the same everywhere; the salt makes the identifiers the same every time.
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "routing", "mathtext.fontset": "dejavusans"}):
        draw().savefig(file, facecolor="white", metadata={"Date": None} if file.suffix == ".svg" else None)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("routing.svg"))
