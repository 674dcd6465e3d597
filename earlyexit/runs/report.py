"""The executed notebooks of a profile become one HTML page that opens from disk without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from nbformat import NotebookNode, v4

from earlyexit.atomic import atomic_path
from earlyexit.runs import freshness
from earlyexit.runs.freshness import RunError
from earlyexit.runs.paths import Project, project
from earlyexit.runs.provenance import Record

# The exporter's page without what it would load from the network; code is there, and folded up.
TEMPLATE = """\
{% extends 'lab/index.html.j2' %}
{% block html_head_js %}{% endblock %}
{% block jupyter_widgets %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block html_head_css %}
<style>main {max-width: 62em; margin: auto} details {margin: 0 0 .5em} summary {color: #777}
img {max-width: 100%; height: auto} .exits td {text-align: left !important}</style>
{% endblock %}
{% block data_png %}<img alt="figure of the code above"
src="data:image/png;base64,{{ output.data['image/png'] | replace("\\n", "") }}">{% endblock %}
{% block input_group %}<details><summary>code</summary>{{ super() }}</details>{% endblock %}
"""
WIDGET = "application/vnd.jupyter.widget-view+json"


def report(label: str, root: str | Path | None = None) -> Path:
    """Write ``build/<label>/report.html`` from the executed copies of a label, and return its path.

    Raises:
        RunError: there is none; the message says what makes them.
    """
    place = project(root)
    names = [path.stem for path in freshness.discover(place)]
    there = [name for name in names if place.executed(label, name).is_file()]
    missing = [name for name in names if name not in there]
    make = f"`python -m earlyexit run --profile {label} --force`"
    if not there:
        folder = place.relative(place.executed(label, names[0]).parent)
        raise RunError(f"no executed notebook in {folder}: {make} runs the series and keeps them")
    head = f"# Early exit, profile `{label}`\n\n"
    head += "\n".join(f"- [{name}](#{name})" for name in there)
    if missing:
        head += (
            f"\n\nNot in this page, because they were not run here: {', '.join(missing)} ({make})."
        )
    page = v4.new_notebook(
        cells=[v4.new_markdown_cell(head)], metadata={"title": f"Report {label}"}
    )
    for name in there:
        page.cells += _cells(place, label, name)
    exporter = HTMLExporter(raw_template=TEMPLATE, exclude_input_prompt=True)
    exporter.exclude_output_prompt = True
    text, _ = exporter.from_notebook_node(page)
    path = place.build / label / "report.html"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _cells(place: Project, label: str, name: str) -> Iterator[NotebookNode]:
    """Yield the cells of an executed copy that has something to show, and where it comes from."""
    executed = nbformat.read(place.executed(label, name), as_version=4)
    record = freshness.published(place, label, name)
    yield v4.new_markdown_cell(f'<a id="{name}"></a>\n\n---\n\n{provenance(record, executed)}')
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.outputs = list(filter(None, map(_still, cell.outputs)))
        cell.id = f"{name[:2]}-{cell.id}"  # unique in the page
        yield cell


def _still(output: NotebookNode) -> NotebookNode | None:
    """Return an output without its widget; None for a bar, or for what went to standard error."""
    if output.output_type == "stream" and output.name == "stderr":
        return None
    if output.output_type in ("display_data", "execute_result") and WIDGET in output.data:
        del output.data[WIDGET]
        return output if "text/html" in output.data else None
    return output


def provenance(record: Record | None, executed: NotebookNode) -> str:
    """Return Markdown that says with what an executed copy was made, or that it is of another run."""
    run = executed.metadata.get("papermill", {})
    began, ended = run.get("start_time", ""), run.get("end_time", "")
    if record is None or not began[:19] <= record.time[:19] <= ended[:19]:
        return (
            "*No record of results is of this run: it was made by hand, or made again elsewhere.*"
        )
    source = f"commit {record.commit[:10]}" if record.commit else "no commit"
    asked = record.fingerprint.parameters if record.fingerprint else record.parameters
    hardware, versions = record.hardware, record.versions
    parts = [
        f"`{record.command}`", source + (" + changes" if record.dirty else ""), record.time,
        f"{record.seconds:.0f} s", f"seeds {asked.get('seeds')}", f"made by {record.made_by}",
        f"{hardware['cpu']}, {hardware['threads']} thread(s), {hardware['gpu'] or 'no GPU'}",
        f"Python {versions['python']}, torch {versions['torch']}",
    ]  # fmt: skip
    return f"*{' · '.join(parts)}*"
