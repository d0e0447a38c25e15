"""The report's sections, from top to bottom. Each takes the run and gives its HTML, or None where it has nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from compress.report.charts import (
    Dot,
    curve_key,
    det_chart,
    histogram_chart,
    marker_key,
    scatter,
    share_bar,
    tallest_bin,
)
from compress.report.entries import Entry, Metric, finite
from compress.report.markup import Markup, element, join
from compress.report.pieces import (
    Format,
    absent,
    breakable,
    date,
    decimal,
    decision_flips,
    facts,
    figure,
    from_to,
    known,
    nested,
    rates,
    runtime,
    scrolled,
    section,
    setting,
    status,
    unbroken,
    words,
)
from compress.report.scores import TrialScores, bin_edges
from compress.report.summary import difference_is_shown, headline, size_words, speed_words, summarize
from compress.units import (
    NOT_MEASURED,
    format_bytes,
    format_count,
    format_interval,
    format_ms,
    format_percent,
    format_seconds,
    format_speedup,
)


@dataclass(frozen=True)
class Context:
    """All that the sections draw from: the table, its rows numbered, and the scores of evaluated variants."""

    table: Mapping[str, Any]
    entries: Sequence[Entry]
    baseline: Entry | None
    metric: Metric
    scores: Mapping[str, TrialScores]


def header(context: Context) -> Markup:
    """Name the run, sum it up in plain words, and show its headline figures."""
    first, *rest = summarize(context.table)
    return element(
        "header",
        element(
            "p",
            element("span", "compress", class_="wordmark"),
            element("span", date(context.table.get("created")), class_="when"),
            class_="masthead",
        ),
        element("h1", str(context.table["run"] or "run")),
        element("p", unbroken(first), class_="lead"),
        element("p", unbroken(" ".join(rest)), class_="lead second") if rest else None,
        _tiles(context),
    )


def _tiles(context: Context) -> Markup | None:
    """Show size, latency, error and decisions of the result beside the baseline's."""
    result, baseline, metric = headline(context.entries), context.baseline, context.metric
    if result is None or baseline is None:
        return None
    shown = difference_is_shown(result, baseline, metric)
    counted, share = decision_flips(result)
    doubt = {
        True: "beyond the 95 % intervals",
        False: "no change shown: within the 95 % intervals",
        None: "",
    }
    figures = (
        ("Size", size_words(result, baseline), from_to(format_bytes, baseline.size_bytes, result.size_bytes), ""),
        ("Latency", speed_words(result, baseline), from_to(format_ms, baseline.latency_ms, result.latency_ms), ""),
        (
            metric.name,
            known(format_percent, result.error(metric)),
            from_to(format_percent, baseline.error(metric), result.error(metric)),
            doubt[shown],
        ),
        ("Decisions changed", share, counted, ""),
    )
    tiles = [
        element(
            "div",
            element("dt", name),
            element("dd", unbroken(figure) if figure else absent(), class_="figure"),
            element("dd", unbroken(below), class_="below"),
            element("dd", unbroken(remark), class_="below") if remark else None,
            class_="tile",
        )
        for name, figure, below, remark in figures
    ]
    caption = element("p", marker_key(result.series), result.label, " against ", baseline.label, class_="tiles-of")
    return join(caption, element("dl", *tiles, class_="tiles"))


def comparison(context: Context) -> Markup:
    """Show the table with its printed columns."""
    metric = context.metric
    columns = ("Variant", "Runtime", "Precision", "Parameters", "Size", metric.name, "Flips", "Latency p50", "Speed-up")
    head = element("tr", *(element("th", name, scope="col") for name in (*columns, "Status")))
    largest = max((entry.size_bytes or 0 for entry in context.entries), default=0)
    slowest = max((entry.latency_ms or 0 for entry in context.entries), default=0)
    rows = [_comparison_row(entry, metric, largest, slowest) for entry in context.entries]
    table = element("table", element("thead", head), element("tbody", *rows), class_="sortable")
    return section("Comparison", scrolled(table, "Comparison of all variants"), _doubtful(context), _explained(context))


def _comparison_row(entry: Entry, metric: Metric, largest: float, slowest: float) -> Markup:
    row = entry.row
    counted, share = decision_flips(entry)
    flips = finite(row["decision_flips"]) if share else None
    interval = entry.interval(metric)
    name = element("th", marker_key(entry.series), breakable(str(row["variant"])), scope="row")
    ends = format_interval(interval)
    cells = (
        words(runtime(entry), "Runtime"),
        words(row["precision"], "Precision"),
        figure(format_count, finite(row["params"]), column="Parameters"),
        figure(format_bytes, entry.size_bytes, _bar(entry.size_bytes, largest), "Size"),
        figure(
            format_percent,
            entry.error(metric),
            element("small", ends, title="95 % interval") if interval else None,
            metric.name,
        ),
        figure(lambda _: share or NOT_MEASURED, flips, element("small", counted), "Flips"),
        figure(format_ms, entry.latency_ms, _bar(entry.latency_ms, slowest), "Latency p50"),
        figure(format_speedup, finite(row.get("speedup")), column="Speed-up"),
        element("td", status(row["status"])),
    )
    return element("tr", name, *cells, class_=None if entry.is_ok else "not-done", data_series=str(entry.series))


def _bar(value: float | None, largest: float) -> Markup | None:
    return share_bar(value / largest) if value and largest else None


def _doubtful(context: Context) -> Markup | None:
    """Name the rows whose error rate cannot be told from the baseline's on these trials."""
    baseline, metric = context.baseline, context.metric
    if baseline is None:
        return None
    others = [entry for entry in context.entries if entry is not baseline]
    names = [entry.label for entry in others if difference_is_shown(entry, baseline, metric) is False]
    if not names:
        return None
    return element(
        "p",
        element("strong", "Not told apart. "),
        f"The {metric.name} of {', '.join(names)} differs from {baseline.label} by less than the 95 % intervals leave "
        "open: these trials do not show a change. The flips compare the same trials one by one and show more.",
        class_="note",
    )


def _explained(context: Context) -> Markup:
    terms = (
        ("EER", "The error rate at the threshold where false acceptances and false rejections are equally frequent."),
        ("Interval", "The small figures under it: 95 % of bootstrap draws over speakers fall between them."),
        ("Flips", "Trials decided otherwise than by the baseline, each variant at its own threshold."),
        ("Latency", "The model alone on 3.0 s of audio, batch 1, warm; the median."),
        ("Speed-up", "The baseline's latency over this one's."),
        (NOT_MEASURED, "Not measured."),
    )
    pairs = [join(element("dt", term), element("dd", meaning)) for term, meaning in terms]
    return element("details", element("summary", "What the columns mean"), element("dl", *pairs, class_="terms"))


def not_done(context: Context) -> Markup | None:
    """Show what was deferred or failed, why, and the command that does it on the target."""
    missing = [entry for entry in context.entries if not entry.is_ok]
    if not missing:
        return None
    cards = [
        element(
            "article",
            element("h3", marker_key(entry.series), entry.label, " ", status(entry.row["status"])),
            element("p", str(entry.row.get("reason") or "No reason was recorded.")),
            join(
                element("p", "Run this on the target:", class_="muted") if entry.row["status"] == "deferred" else None,
                element("pre", element("code", str(entry.row["command"])), class_="command"),
            )
            if entry.row.get("command")
            else None,
            class_=f"card {'bad' if entry.row['status'] == 'failed' else 'later'}",
        )
        for entry in missing
    ]
    return section("Not done here", element("div", *cards, class_="stack"))


def trade_offs(context: Context) -> Markup | None:
    """Plot error against latency and against size, with the Pareto front."""
    largest = max((entry.size_bytes or 0 for entry in context.entries), default=0)
    divisor, unit = (1e6, "MB") if largest >= 1e6 else (1e3, "kB")
    axes: tuple[tuple[str, Callable[[Entry], float | None]], ...] = (
        ("latency p50 (ms)", lambda entry: entry.latency_ms),
        (f"size ({unit})", lambda entry: None if entry.size_bytes is None else entry.size_bytes / divisor),
    )
    figures = []
    for cost_name, cost_of in axes:
        dots = [dot for entry in context.entries if (dot := _dot(entry, cost_of(entry), context.metric)) is not None]
        if not dots:
            continue
        left_out = [entry.label for entry in context.entries if entry not in [dot.entry for dot in dots]]
        absent = element("p", f"Not measured, so not drawn: {', '.join(left_out)}.", class_="muted")
        title = f"{context.metric.name} against {cost_name.split(' ')[0]}"
        chart, unnamed = scatter(dots, cost_name, context.metric)
        names = [element("li", marker_key(entry.series), entry.label) for entry in unnamed]
        figures.append(
            element(
                "figure",
                element("figcaption", title),
                chart,
                element("ul", *names, class_="names") if names else None,
                absent if left_out else None,
                class_="card",
            )
        )
    if not figures:
        return None
    return section(
        "What it buys, what it costs",
        element(
            "p",
            "Lower left is better. The dashed line is the Pareto front: filled dots lie on it, and no other variant is "
            "better than them in both respects; hollow dots are beaten by another one. Bars are 95 % intervals.",
            class_="intro",
        ),
        element("div", *figures, class_="two"),
    )


def _dot(entry: Entry, cost: float | None, metric: Metric) -> Dot | None:
    error, interval = entry.error(metric), entry.interval(metric)
    if cost is None or error is None or not entry.is_ok:
        return None
    between = f" ({format_interval(interval)})" if interval else ""
    tip = (
        f"{entry.label}\n{metric.name} {format_percent(error)}{between}\n"
        f"latency {format_ms(entry.latency_ms)}\nsize {format_bytes(entry.size_bytes)}"
    )
    return Dot(entry, cost, 100 * error, (100 * interval[0], 100 * interval[1]) if interval else None, tip)


def score_charts(context: Context) -> Markup | None:
    """Draw the DET curves and each variant's score histograms."""
    drawable = {name: trials for name, trials in context.scores.items() if trials.drawable}
    left_out = [name for name in context.scores if name not in drawable]
    absent = element("p", f"Not drawn, for want of finite scores of both kinds: {', '.join(left_out)}.", class_="muted")
    if not drawable:
        return None
    series = {entry.row["variant"]: entry.series for entry in context.entries}
    edges = bin_edges(drawable.values())
    tallest = tallest_bin(drawable, edges)
    legend = [
        element(
            "li",
            curve_key(series[name]),
            element("span", name, class_="name"),
            element("small", "FA ", rates(trials)[0], " · FR ", rates(trials)[1]),
            data_series=str(series[name]),
        )
        for name, trials in drawable.items()
    ]
    det = element(
        "figure",
        element(
            "div",
            element("figcaption", "Detection error trade-off"),
            element(
                "p",
                "Every threshold is a point of the curve: a stricter one lies further up and left. Nearer to the lower "
                "left corner is better. The marker is the variant's own threshold; on the diagonal both errors are "
                "equally frequent.",
            ),
            element("ul", *legend, class_="legend"),
            element("p", "FA, FR: false acceptance and false rejection at the marker.", class_="muted"),
        ),
        det_chart(drawable, series),
        class_="card det",
    )
    panels = [
        element(
            "figure",
            element("figcaption", marker_key(series[name]), name),
            histogram_chart(name, trials, edges, tallest),
            class_="card",
        )
        for name, trials in drawable.items()
    ]
    kinds = element(
        "p",
        element("span", element("span", "", class_="swatch target"), "target trials (same speaker)", class_="kind"),
        element("span", element("span", "", class_="swatch nontarget"), "non-target trials", class_="kind"),
        "Heights are shares of each kind; all axes are the same.",
        class_="intro",
    )
    return join(
        section("Errors at every threshold", det, absent if left_out else None),
        section("Scores", kinds, element("div", *panels, class_="three")),
    )


def step_cards(context: Context) -> Markup:
    """Tell what each pass did, in order: settings, notes, artifact."""
    groups = groupby(context.entries, key=lambda entry: (entry.row["variant"], entry.row["pass"]))
    cards = [_step_card(index, list(group)) for index, (_, group) in enumerate(groups)]
    return section("What each pass did", element("ol", *cards, class_="steps"))


def _step_card(index: int, group: Sequence[Entry]) -> Markup:
    entry = group[0]
    row = entry.row
    notes = list(dict.fromkeys(str(note) for member in group for note in member.row.get("notes") or ()))
    settings = row.get("settings") or {}
    built = finite(row.get("build_s"))
    folder = (row.get("artifact") or {}).get("folder")
    told = element("ul", *(element("li", unbroken(note)) for note in notes), class_="notes")
    if not notes:
        told = element("p", "As given." if index == 0 else str(row.get("reason") or "Nothing to note."))
    rows = [
        element("tr", element("th", str(name), scope="row"), element("td", setting(value)))
        for name, value in settings.items()
    ]
    table = element("table", element("tbody", *rows), class_="settings")
    took = element("span", f"took {format_seconds(built)}", class_="muted") if built is not None else None
    return element(
        "li",
        element(
            "h3",
            element("span", f"{index:02d}", class_="step-number"),
            str(row.get("pass") or row["variant"]),
            " ",
            status(row["status"]) if not entry.is_ok else None,
            took,
        ),
        element("p", marker_key(entry.series), str(row["variant"]), class_="gives") if index else None,
        element("div", told, table if settings else None, class_="step-body"),
        _artifact(str(folder), row) if folder else None,
        class_="card",
    )


def _artifact(folder: str, row: Mapping[str, Any]) -> Markup:
    digest = (row.get("artifact") or {}).get("sha256")
    return element(
        "p",
        "Artifact ",
        element("code", f"{folder.rstrip('/')}/"),
        f" · {known(format_bytes, finite(row['size_bytes']))}" if row["size_bytes"] is not None else None,
        join(" · sha256 ", element("code", f"{digest[:12]}…", title=str(digest))) if digest else None,
        class_="artifact",
    )


def more_figures(context: Context) -> Markup:
    """List every further figure of the table, a column per row."""
    lines: tuple[tuple[str, Format, Callable[[Mapping[str, Any]], Any]], ...] = (
        ("minDCF (p_target 0.01)", decimal, lambda row: row["min_dcf"]),
        ("threshold (cosine)", decimal, lambda row: row["threshold"]),
        ("embedding cosine to baseline, mean", decimal, lambda row: row["cosine_mean"]),
        ("embedding cosine to baseline, lowest", decimal, lambda row: row["cosine_min"]),
        *((f"latency {key}", format_ms, nested("latency_ms", key)) for key in ("mean", "p50", "p95", "p99")),
        *((f"end to end {key}", format_ms, nested("e2e_latency_ms", key)) for key in ("mean", "p50", "p95", "p99")),
        ("real-time factor", lambda value: decimal(value, 5), lambda row: row["rtf"]),
        ("utterances per second", format_count, lambda row: row["qps"]),
        ("peak memory (RSS)", format_bytes, lambda row: row["peak_rss_bytes"]),
        ("MACs per second of audio", format_count, lambda row: row["macs"]),
        ("parameters", format_count, lambda row: row["params"]),
        ("threads", format_count, lambda row: row["threads"]),
        ("time to build", format_seconds, lambda row: row["build_s"]),
    )
    head = element(
        "tr", element("td", ""), *(element("th", marker_key(e.series), e.label, scope="col") for e in context.entries)
    )
    rows = [
        element(
            "tr",
            element("th", name, scope="row"),
            *(figure(format_figure, finite(value(entry.row))) for entry in context.entries),
        )
        for name, format_figure, value in lines
    ]
    table = element("table", element("thead", head), element("tbody", *rows))
    return section(
        "All figures",
        element("details", element("summary", "Show every figure that was measured"), scrolled(table, "All figures")),
    )


def footer(context: Context) -> Markup:
    """Say where and on what it was measured, and what lies beside this file."""
    beside = ("table.json", "table.csv", "table.md", "run.yaml", "events.jsonl")
    folders = [
        str(row["artifact"]["folder"]) for row in context.table["rows"] if (row.get("artifact") or {}).get("folder")
    ]
    folder = folders[-1] if folders else None
    use = join(
        element("p", "Verify an artifact on the target, and use it:"),
        element(
            "pre",
            element("code", f"compress check {folder}\npython -c \"import compress; compress.load('{folder}')\""),
            class_="command",
        ),
    )
    files = element(
        "div",
        element("h3", "Beside this file"),
        element("p", join(*(element("code", name) for name in (*beside, *dict.fromkeys(folders))), separator=" · ")),
        use if folder else None,
        element("p", "The same run again: ", element("code", "compress run --config run.yaml")),
    )
    return element(
        "footer",
        element("div", element("h3", "Machine"), facts(context.table["machine"] or {})),
        element("div", element("h3", "Data"), facts(context.table["data"] or {})),
        files,
    )
