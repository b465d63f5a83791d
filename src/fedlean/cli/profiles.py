"""`fedlean profile`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated

from cyclopts import Parameter
from rich.text import Text

from fedlean.cli.options import Place, Whole
from fedlean.cli.screen import err, say, show
from fedlean.measure import responder
from fedlean.measure.device import Request, measure_device
from fedlean.measure.probe import parse_address
from fedlean.measure.result import write as write_profile
from fedlean.printable import printable
from fedlean.report import profile_page as report_profile
from fedlean.report.page import write_page


def profile(
    *,
    model: str = "conv2",
    dataset: str | None = None,
    input_shape: Annotated[
        list[Whole] | None, Parameter(consume_multiple=True, negative=())
    ] = None,
    classes: Whole | None = None,
    batch: Whole = 20,
    local_steps: Whole = 5,
    densities: Annotated[list[float] | None, Parameter(consume_multiple=True, negative=())] = None,
    threads: Whole = 1,
    repeats: Whole = 5,
    seconds: float = 300.0,
    link: str | None = None,
    serve: str | None = None,
    out: Place = Path("profile.json"),
) -> None:
    """Measure this device's time model and link into a profile for --device.

    Parameters
    ----------
    model
        a name from 'fedlean models', with options as resnet18,norm=batch, or
        package.module:function
    dataset
        take the input shape and the classes of this data set (digits, or a folder)
    input_shape
        of the model, e.g. 1 28 28 (the default)
    classes
        of the model (default: 62)
    batch
        examples a step
    local_steps
        steps of a round
    densities
        kept fractions to time (default: 1 0.5 0.3 0.2 0.1 0.05 0.02 0.01)
    threads
        threads of the native engine
    repeats
        how often each sub-model is timed
    seconds
        time budget; what it does not allow is left out, and said
    link
        HOST:PORT of a 'fedlean profile --serve': measure the link to it, too
    serve
        HOST:PORT to answer such probes on, until interrupted; measures nothing
    out
        profile file to write; a page of plots goes beside it where matplotlib is installed
    """
    if serve is not None:
        _serve(serve)
        return
    if dataset is not None and (input_shape or classes):
        raise ValueError("--dataset gives the shape and the classes: leave out the other two")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file")
    if out.suffix == ".html":
        raise ValueError(f"--out {out} is where the page goes: name the profile {out.stem}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=out.parent):  # may be written, found before minutes are spent
        pass
    request = Request(
        model=model,
        dataset=dataset,
        input_shape=tuple(input_shape or Request.input_shape),
        classes=Request.classes if classes is None else classes,
        batch_size=batch,
        local_steps=local_steps,
        densities=tuple(densities or Request.densities),
        threads=threads,
        repeats=repeats,
        seconds=seconds,
        link=link,
    )
    with err.status("measuring") as status:
        result = measure_device(
            request,
            out.stem,
            lambda what, done, planned: status.update(
                Text(printable(f"{done} of {planned}: {what}"))
            ),
        )
    write_profile(out, result)
    for table in report_profile.profile_tables(result):
        show(table)
    for line in report_profile.notes(result):
        show(line)
    show(f"wrote {out}; use it with --device {out}")
    try:
        page = out.with_suffix(".html")
        write_page(page, report_profile.profile_page(result))
        show(f"plots: {page}")
    except ValueError as error:  # matplotlib is optional: the profile is whole without its page
        show(f"no page: {error}")


def _serve(address: str) -> None:
    host, port = parse_address(address)
    with responder.listen(host, port) as listener:
        bound = listener.getsockname()[1]
        say(f"answering link probes on {host}, port {bound}; stop with Ctrl-C")
        responder.serve(listener, say)
