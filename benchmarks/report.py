"""From pytest-benchmark's JSON to docs/performance.md and docs/performance.svg."""

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from textwrap import TextWrapper

GB = 1e9
INTRODUCTION = """# Performance

Made by `{command}` (benchmarks/report.py writes this page; do not edit it by hand).

Contenders take turns in the same run; the first turn of each is dropped; figures are medians, with the slowest and the
fastest run in brackets. *Warm*: the source is in the page cache; *cold*: it was dropped from it. *Durable*: on the disk
when the clock stops (file contents and names). *Digested*: every byte is checked against, or yields, a digest. CPU
seconds are those of the process: what the kernel writes back later for buffered tools is not in them. Memory is the
largest resident set of the process, for ckptstore Python included; of a save in the background also torch, and the state
where it is on the CPU. Every run's result was checked. `dcp.load` fills tensors that are there; the other loads make new ones,
and memory that a virtual machine has yet to get from its host is slow. To and from a bucket, the server (SeaweedFS, or
Ceph in memory) runs on the same machine, and program start counts.

"""

#: What the page says first: a table, ours in it, and who it is set against.
COMPARED = (
    (
        "copy, 16 shards, warm",
        "ckptstore",
        ("fio write", "cp -r, sync", "cp -r, sync, b3sum of both", "cp -r, sync, sha256sum of both", "rsync -a, sync",
         "rclone copy, sync"),
    ),
    ("copy, 16 shards, cold", "ckptstore", ("fio read and write at once", "cp -r, sync", "cp -r, sync, b3sum of both")),
    ("copy, one file, warm", "ckptstore", ("fio write", "cp -r, sync", "cp -r, sync, b3sum of both", "rsync -a, sync")),
    ("copy, small files, warm", "ckptstore", ("cp -r, sync",)),
    ("digest, warm", "ckptstore", ("cat >/dev/null", "b3sum", "sha256sum")),
    ("save from memory", "ckptstore.torch.save", ("fio write", "DCP", "DCP, 4 threads", "torch.save", "safetensors, fsync")),
    ("save from memory", "dcp.save, StoreWriter", ("fio write", "DCP", "DCP, 4 threads")),
    ("load into memory, warm", "dcp.load, StoreReader", ("dcp.load",)),
    ("load into memory, warm", "ckptstore.torch.load", ("torch.load", "safetensors load_file")),
    ("load into memory, cold", "dcp.load, StoreReader", ("dcp.load",)),
    ("load into memory, cold", "ckptstore.torch.load", ("torch.load", "safetensors load_file")),
    ("what training waits for, of a save in the background", "ckptstore.torch.save_async", ("one memcpy", "dcp.async_save")),
    ("to a bucket", "ckptstore", ("s5cmd", "rclone", "boto3", "aws s3 cp", "s3fs")),
    ("from a bucket", "ckptstore", ("s5cmd", "rclone", "boto3", "aws s3 cp", "s3fs")),
    ("to a bucket, Ceph", "ckptstore", ("s5cmd", "rclone", "boto3", "aws s3 cp", "s3fs")),
    ("from a bucket, Ceph", "ckptstore", ("s5cmd", "rclone", "boto3", "aws s3 cp", "s3fs")),
)  # fmt: skip


@dataclass
class Row:
    """One contender in one table, over all its turns."""

    name: str
    ours: bool
    durable: bool
    digested: bool
    speeds: list[float]  # GB/s
    cpu_s_per_gb: float
    peak_mib: float

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds)


def tables_of(figures: dict) -> dict[str, list[Row]]:
    """Group the runs by table and contender, without each one's first turn."""
    runs = defaultdict(list)
    for benchmark in figures["benchmarks"]:
        info = benchmark["extra_info"]
        if "contender" in info:
            runs[info["group"], info["contender"]].append(info)
        if "up" in info:  # the way there, measured before the way back
            there = info | info["up"] | {"durable": False}  # what a store does with it is the store's
            runs[info["group"].replace("from", "to", 1), info["contender"]].append(there)
    tables = defaultdict(list)
    for (group, name), infos in runs.items():
        counted = [info for info in infos if info["turn"] != 0] or infos
        first = counted[0]
        tables[group].append(
            Row(
                name,
                first["ours"],
                first["durable"],
                first["digested"],
                [info["moved_bytes"] / GB / info["seconds"] for info in counted],
                statistics.median(info["cpu_s"] / (info["moved_bytes"] / GB) for info in counted),
                max(info["peak_bytes"] for info in counted) / (1 << 20),
            )
        )
    return tables


def limit_of(group: str, rows: list[Row]) -> Row | None:
    """What the others are measured by in this table."""
    if group.startswith("digest, warm"):
        wanted = "cat >/dev/null"
    elif group.startswith("digest, cold"):
        wanted = "fio read"
    elif group.startswith("what training waits for"):
        wanted = "one memcpy"
    else:
        wanted = "fio read and write at once" if group.endswith("cold") else "fio write"
    return next((row for row in rows if row.name == wanted), None)


def table(group: str, rows: list[Row]) -> str:
    limit = limit_of(group, rows)
    in_memory = "in memory" in group
    lines = [f"## {group[0].upper()}{group[1:]}", ""]
    head = ["", "GB/s"]
    if limit:
        head.append(f"× {limit.name}")
    if not in_memory:
        head += ["CPU-s/GB", "MiB", "durable", "digested"]
    lines.append("| " + " | ".join(head) + " |")
    lines.append("|" + " --- |" + " ---: |" * (len(head) - 1))
    for row in sorted(rows, key=lambda row: -row.speed):
        name = f"**{row.name}**" if row.ours else row.name
        speed = f"{row.speed:.2f}"
        if len(row.speeds) > 1:
            speed += f" ({min(row.speeds):.2f}–{max(row.speeds):.2f})"
        cells = [name, speed]
        if limit:
            cells.append(f"{row.speed / limit.speed:.2f}")
        if not in_memory:
            memory = f"{row.peak_mib:.0f}" if row.peak_mib else ""
            cells += [f"{row.cpu_s_per_gb:.2f}", memory]
            cells += ["yes" if flag else "no" for flag in (row.durable, row.digested)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def in_short(tables: dict[str, list[Row]]) -> str:
    """A line for each comparison that was measured."""
    lines = []
    for group, ours, peers in COMPARED:
        rows = {row.name: row for row in tables.get(group, ())}
        if ours not in rows:
            continue
        kind = " and ".join(word for word, so in (("digested", rows[ours].digested), ("durable", rows[ours].durable)) if so)
        against = [f"{rows[ours].speed / rows[peer].speed:.2f}× {peer}" for peer in peers if peer in rows]
        what = f"{group[0].upper()}{group[1:]}" + ("" if ours == "ckptstore" else f", {ours}")
        lines.append(f"- **{what}** ({kind}): {rows[ours].speed:.2f} GB/s. " + " · ".join(against))
    return "In short (1.17× X: 1.17 times as fast as X):\n\n" + "\n".join(lines) + "\n\n" if lines else ""


def machine(info: dict) -> list[str]:
    """What the figures of a run depend on."""
    cpu = info.get("cpu", {})
    return [
        f"{cpu.get('brand_raw', 'unknown processor')}, {info.get('cores', '?')} cores, AVX-512: "
        f"{'yes' if info.get('avx512') else 'no'}, CRC path: {info.get('crc64', '?')}",
        f"{info.get('memory_bytes', 0) / GB:.0f} GB memory, kernel {info.get('release', '?')}",
        info.get("file_system", "?"),
    ]


def provenance(runs: list[dict]) -> str:
    """Each machine; and when the runs there were made, of what, and how busy it was."""
    machines = defaultdict(list)
    for run in runs:
        tables = ", ".join(dict.fromkeys(group.partition(",")[0] for group in tables_of(run)))
        commit, info = run["commit_info"], run["machine_info"]
        machines[tuple(machine(info))].append(
            f"{tables}: {info.get('size', '?')} a run, {run['datetime'][:16].replace('T', ' ')}, commit "
            f"{commit.get('id', '?')[:12]}{' with changes' if commit.get('dirty') else ''}, load average then "
            f"{info.get('load', [0])[0]:.1f}"
        )
    lines = TextWrapper(width=128, initial_indent="- ", subsequent_indent="  ")
    parts = ["\n".join(map(lines.fill, (*facts, *made))) for facts, made in machines.items()]
    return "\n\nOn another machine:\n\n".join(parts) + "\n\n"


def picture(tables: dict[str, list[Row]], path: Path) -> bool:
    """Bars of the copy, digest and save tables; the best of ours and all of theirs, longest on top."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "ckptstore"  # the same figures give the same file
    shown = [group for group in tables if "in memory" not in group or ("KiB" in group and "1024" in group)]
    if not shown:  # a run of other benchmarks alone
        return False
    shown.sort(key=lambda group: -len(tables[group]))  # those side by side are of like height
    columns = 2
    lines = -(-len(shown) // columns)
    heights = [max(len(tables[g]) for g in shown[i * columns : (i + 1) * columns]) for i in range(lines)]
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(13, 0.29 * sum(heights) + 0.8 * lines),
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for group, axis in zip(shown, axes.flat, strict=False):
        rows = sorted(tables[group], key=lambda row: row.speed)
        colours = ["#2a6fdb" if row.ours else "#444444" if row is limit_of(group, rows) else "#b9bec7" for row in rows]
        labels = [row.name + ("" if not row.durable or row.name.startswith("fio") else "  ●") for row in rows]
        bars = axis.barh(labels, [row.speed for row in rows], color=colours, height=0.72)
        axis.bar_label(bars, [f"{row.speed:.2f}" for row in rows], padding=3, fontsize=8)
        axis.set_title(group, loc="left", fontsize=10, fontweight="bold")
        axis.set_xlim(0, max(row.speed for row in rows) * 1.12)
        axis.tick_params(axis="y", labelsize=8, length=0)
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.supxlabel("GB/s, median   (blue: ckptstore, always digested · black: what the disk can do · ● durable)", fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True


def write(sources: list[Path], page: Path) -> None:
    """Write the page from one JSON, or from several (tables that were run one by one)."""
    runs = [json.loads(source.read_text()) for source in sources]
    tables = tables_of({"benchmarks": [benchmark for run in runs for benchmark in run["benchmarks"]]})
    info = runs[0]["machine_info"]
    command = "./run bench" + (f" --size {info.get('size', '')}" if len(runs) == 1 else ", table by table")
    text = INTRODUCTION.format(command=command) + provenance(runs)
    page.parent.mkdir(parents=True, exist_ok=True)
    drawing = page.with_suffix(".svg")
    if picture(tables, drawing):
        text += f"![Speeds of all contenders]({drawing.name})\n\n"
    text += in_short(tables)
    if len(runs) > 1:  # the page of the repository; of another machine's run the notes would not be true
        text += Path(__file__).with_name("notes.md").read_text() + "\n"
    page.write_text(text + "\n".join(table(group, rows) for group, rows in tables.items()))
