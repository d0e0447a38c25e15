"""``compress threshold``."""

import json
from pathlib import Path

import click

from compress.artifact import store_decision
from compress.cli.display import Bars, open_model, print_table
from compress.cli.inspect import arch_option, json_option
from compress.data import DataFolder
from compress.data.folder import check_new
from compress.decision import QUALITIES, Cohort
from compress.errors import SettingError
from compress.evaluation.pictures import draw, prepare
from compress.evaluation.speakers import Verification
from compress.evaluation.thresholds import Fit, Wanted, fit_decision, make_cohort
from compress.passes import Cell
from compress.runners import open_runner
from compress.units import format_interval, format_percent

ON_OTHERS = (
    '"Before" takes the score itself for log-odds. actDCF, Cllr, FPR and FNR are of speakers that took no part in the'
    " fit (cross-validation over speakers; 95 % intervals by bootstrap over speakers). What is stored is fitted on all."
)


@click.command("threshold")
@click.argument("model")
@click.option("--data", required=True, metavar="DIR", help="Data folder with the trials.")
@click.option("--trials", metavar="FILE", help="Trial list: a name in the data folder, or a path.")
@click.option("--cohort", metavar="DIR", help="Data folder of other speakers, to normalize scores by (AS-Norm).")
@click.option("--cohort-utterances", type=click.IntRange(1), default=5, show_default=True, help="Of each speaker.")
@click.option("--top-n", type=click.IntRange(2), help="Of the cohort's scores, so many count. Default: 200, or all.")
@click.option("--fpr", type=float, default=0.01, show_default=True, help="Of the preset fpr: at most this fraction.")
@click.option("--prior", type=float, default=0.5, show_default=True, help="Part of targets that the fit is for.")
@click.option("--costs", metavar="MISS,FA", help="Of the preset cost: of a miss and of a false acceptance.")
@click.option("--quality", metavar="LIST", default="", help=f"Log-odds depend on these: {','.join(QUALITIES)}.")
@click.option("--preset", default="general", show_default=True, help="That `compress verify` takes by default.")
@click.option("--plots", type=click.Path(path_type=Path), metavar="DIR", help="Write ROC, DET and histograms there.")
@click.option("--out", metavar="DIR", help="Artifact folder. Default: MODEL itself, or MODEL-threshold if it is none.")
@arch_option
@json_option
def threshold_command(
    model: str,
    data: str,
    trials: str | None,
    cohort: str | None,
    cohort_utterances: int,
    top_n: int | None,
    fpr: float,
    prior: float,
    costs: str | None,
    quality: str,
    preset: str,
    plots: Path | None,
    out: str | None,
    arch: str | None,
    as_json: bool,
) -> None:
    """Fit thresholds and log-odds of MODEL to trials, and store them in its artifact for `compress verify`."""
    qualities = tuple(dict.fromkeys(filter(None, quality.split(","))))
    wanted = Wanted(fpr, prior, read_costs(costs), qualities, preset)
    if top_n is not None and cohort is None:
        raise SettingError("--top-n counts scores of a cohort: give one with --cohort DIR.")
    if plots is not None:
        prepare(plots)
    artifact, bars = open_model(model, arch), Bars()
    inside = out is None and (Path(model) / "artifact.json").is_file()
    folder = Path(model) if inside else Path(out or f"{Path(model).stem or Path(model).name}-threshold")
    if not inside:
        check_new(folder)
    verification = Verification.read(DataFolder.read(data), trials)
    runner = open_runner(artifact, threads=1)
    others: Cohort | None = None
    if cohort is not None:
        others = make_cohort(DataFolder.read(cohort), verification, runner, bars, cohort_utterances, top_n)
    embeddings = verification.embed(runner, bars, f"{runner.runtime}: embedding")
    name = verification.folder.find_trials(trials).name
    fit = fit_decision(verification, name, embeddings, others, wanted, runner.runtime)
    if inside:
        store_decision(folder, fit.decision)
    else:
        artifact.with_decision(fit.decision).save(folder)
    drawn = [str(path) for path in draw(fit, plots)] if plots is not None else []
    if as_json:
        click.echo(json.dumps({**fit.decision.record(), "warnings": fit.warnings, "plots": drawn, "out": str(folder)}))
        return
    print_fit(fit)
    for path in drawn:
        click.echo(path)
    click.echo(f"{folder}: stored. `compress verify {folder} A B` decides by it, at preset {fit.decision.preset}.")


def read_costs(text: str | None) -> tuple[float, float] | None:
    """Read ``miss,fa``.

    Raises:
        SettingError: If it is not two numbers.
    """
    if text is None:
        return None
    try:
        miss, false_acceptance = map(float, text.split(","))
    except ValueError:
        raise SettingError(f"--costs takes two numbers, of a miss and a false acceptance, got '{text}'.") from None
    return miss, false_acceptance


def print_fit(fit: Fit) -> None:
    """Print what was measured, the operating points and what to know."""
    decision, labels = fit.decision, fit.labels
    click.echo(f"{len(labels):,} trials, {int(labels.sum()):,} of them targets, of {decision.data}/{decision.trials}")
    if decision.cohort is not None:
        about = decision.cohort
        click.echo(f"AS-Norm by the {about.top_n} nearest of {len(about.embeddings)} speakers of {about.data}")
    rows: list[dict[str, Cell]] = []
    for stage in fit.stages:
        figures = stage.figures
        rows.append(
            {
                "scores": figures.scores,
                "EER (95 %)": with_interval(figures.eer, figures.eer_ci95),
                "minDCF": f"{figures.min_dcf:.3f}",
                "actDCF before": f"{figures.act_dcf_before:.3f}",
                "actDCF (95 %)": with_range(figures.act_dcf, figures.act_dcf_ci95),
                "minCllr": f"{figures.min_cllr:.3f}",
                "Cllr before": f"{figures.cllr_before:.3f}",
                "Cllr (95 %)": with_range(figures.cllr, figures.cllr_ci95),
            }
        )
    click.echo()
    print_table(rows)
    click.echo()
    print_table(
        [
            {
                "preset": point.name,
                "from log-odds": f"{point.llr:.2f}",
                "from score": "varies" if point.score is None else f"{point.score:.3f}",
                "FPR (95 %)": with_interval(point.fpr, point.fpr_ci95),
                "FNR (95 %)": with_interval(point.fnr, point.fnr_ci95),
                "rule": point.rule,
            }
            for point in decision.points
        ]
    )
    click.echo(f"\n{ON_OTHERS}")
    for warning in fit.warnings:
        click.echo(f"warning: {warning}")


def with_interval(rate: float, interval: tuple[float, float] | None) -> str:
    """A rate in percent with its interval."""
    return format_percent(rate) + (f" ({format_interval(interval)})" if interval else "")


def with_range(value: float, interval: tuple[float, float] | None) -> str:
    """A cost with its interval."""
    return f"{value:.3f}" + (f" ({interval[0]:.3f}–{interval[1]:.3f})" if interval else "")
