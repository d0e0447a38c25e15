"""The report of a run: one offline HTML file made from the table and the trial scores."""

from compress.report.charts import pareto_front
from compress.report.page import render_report
from compress.report.scores import TrialScores
from compress.report.summary import summarize

__all__ = ["TrialScores", "pareto_front", "render_report", "summarize"]
