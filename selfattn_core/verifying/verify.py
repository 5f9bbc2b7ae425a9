"""`verify`: compare the outputs of an exported file with the numpy definition at its weights, in float64."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.cases.case import Layout
from selfattn_core.conformance.verdicts.tolerance import Expectation, measure
from selfattn_core.features import read_features
from selfattn_core.installed import NotInstalledError, missing_modules
from selfattn_core.porting.load import load_any
from selfattn_core.verifying.containers import CONTAINERS, Container, Runtime, container_of
from selfattn_core.verifying.diagnosis import Evidence, diagnose
from selfattn_core.verifying.errors import VerifyError
from selfattn_core.verifying.precision import PRECISIONS, expected, factor, found_precision, held
from selfattn_core.verifying.process import Answer, CrashedError, Process
from selfattn_core.verifying.questions import Question, own_question, questions
from selfattn_core.verifying.report import Finding, VerifyReport
from selfattn_core.verifying.signature import LAYOUTS, Signature, signature

__all__ = ["verify"]

PathLike = str | os.PathLike[str]

_UNEXPLAINED = (
    "no known bug was searched for, because only answers on large maps are wrong: export for a smaller map, or pass a smaller "
    "size, if the file accepts one."
)


def verify(
    artifact: PathLike,
    weights: PathLike,
    *,
    container: str | None = None,
    runtime: str | None = None,
    input_name: str | None = None,
    output_name: str | None = None,
    map_name: str | None = None,
    layout: Layout | None = None,
    size: tuple[int, int] | None = None,
    precision: str | None = None,
    features: PathLike | None = None,
    array: str | None = None,
    sample: int | None = None,
    block: str | None = None,
    dialect: str | None = None,
    prefix: str | None = None,
    settings: Mapping[str, str | bool | float] | None = None,
    strict: bool = True,
) -> VerifyReport:
    """Run an exported file on designed inputs, and compare its outputs with the definition at these weights.

    The file runs in its own runtime and in a separate process. Some formats contain code, which their runtime executes:
    verify only files that you would run anyway.

    Args:
        artifact: a file of the layer, the folder of a SavedModel, or "module:function".
        weights: a canonical file. With `dialect`, anybody's checkpoint.
        container: name of the format in `CONTAINERS`. By default the suffix determines it.
        runtime: name of the runtime. By default the first that is installed.
        input_name: name of x, or of the tensor where a part of a network starts.
        output_name: name of y, or of the tensor where the part ends.
        map_name: name of the output with the attention map. By default an output with three axes.
        layout: "channels_last" or "channels_first", if the shapes do not determine it.
        size: (H, W) of the maps, if the sizes are open. By default several sizes.
        precision: "float32", "float16", "bfloat16" or "int8", which sets the limits. By default that of the stored weights.
        features: an `.npy` or `.npz` file with a feature map in the file's layout, used instead of the designed inputs.
        array: name of the array of `features`, if there are several.
        sample: number of the sample of `features`, if there are several.
        block: name of the block of a canonical file.
        dialect: dialect of a checkpoint.
        prefix: prefix of the block of a checkpoint.
        settings: facts that a checkpoint does not contain.
        strict: whether unused tensors under the prefix are an error.

    Returns:
        The report. Its `passed` is True if every answer is within the limits.

    Raises:
        VerifyError: if the artifact or an option cannot be used, or does not fit the weights.
        ValueError: if the weights cannot be used.
        OSError: if a file cannot be read.
        ModuleNotFoundError: if the runtime is not installed.

    Example:
        >>> import tempfile
        >>> from selfattn_core import init_params, save
        >>> config = SelfAttentionConfig(16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     weights = f"{folder}/new.safetensors"
        ...     save(weights, config, init_params(config, seed=0))
        ...     report = verify("numpy:copy", weights, layout="channels_last", size=(4, 5))
        >>> report.passed, report.notes[0]
        (True, 'gamma is 0, so the function of these weights is y = x: nothing was learnt about the attention.')
    """
    artifact, weights = os.fspath(artifact), os.fspath(weights)
    name = container_of(artifact, container)
    _check_options(name, layout, precision, size, features)
    chosen = _runtime(CONTAINERS[name], runtime, artifact)
    config, given = load_any(
        weights, block=block, dialect=dialect, prefix=prefix, settings=settings, strict=strict
    )
    params = {key: array.astype(np.float64) for key, array in given.items()}
    names = tuple(each for each in (output_name, map_name) if each is not None)
    with Process(chosen, artifact, input_name=input_name, output_names=names) as process:
        try:
            described = process.open()
        except CrashedError as error:
            raise VerifyError(f"{artifact}: {chosen.name} did not open it: {error}") from error
        found = signature(
            artifact,
            described,
            config,
            input_name=input_name,
            output_name=output_name,
            map_name=map_name,
            layout=layout,
        )
        held_to, why = (
            found_precision(found.x.dtype, described.formats) if precision is None else (precision, "")
        )
        own = None if features is None else _own_question(config, found, features, array, sample)
        asked = [own] if own else _designed(artifact, config, params, found, held_to, size)
        asked = [Question(each.name, held(each.x, found.x.dtype, held_to)) for each in asked]
        findings, evidence = _ask_all(process, config, params, found, held_to, asked)
    wrong = any(not finding.passed and not finding.refused for finding in findings)
    explained = diagnose(config, params, evidence, factor(held_to)) if wrong else []
    return VerifyReport(
        artifact=artifact,
        weights=weights,
        container=CONTAINERS[name].title,
        runtime=chosen.name,
        versions=described.versions,
        config=config.to_dict(),
        layout=found.layout,
        sizes=found.sizes,
        with_map=found.attention is not None,
        precision=held_to,
        why=why,
        factor=factor(held_to),
        findings=tuple(findings),
        diagnosis=tuple(explained or ()),
        notes=(
            *described.notes,
            *(() if explained is not None else (_UNEXPLAINED,)),
            *_notes(params, evidence, factor(held_to)),
        ),
    )


def _check_options(
    container: str, layout: str | None, precision: str | None, size: object, features: object
) -> None:
    problems = []
    if layout is not None and layout not in LAYOUTS:
        problems.append(f"layout {layout!r}: expected {' or '.join(LAYOUTS)}")
    if precision is not None and precision not in PRECISIONS:
        problems.append(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if size is not None and features is not None:
        problems.append("size is for designed inputs, and features replace them: pass only one of the two")
    if container == "callable" and layout is None:
        problems.append(f"a function does not say its layout: give layout, one of {', '.join(LAYOUTS)}")
    if problems:
        raise VerifyError(f"{'; '.join(problems)}.")


def _runtime(container: Container, name: str | None, artifact: str) -> Runtime:
    runtimes = container.runtimes
    if name is not None:
        runtimes = tuple(each for each in runtimes if each.name == name)
        if not runtimes:
            known = ", ".join(each.name for each in container.runtimes)
            raise VerifyError(f"runtime {name!r}: {container.title} files are run by {known}.")
    for each in runtimes:
        if not missing_modules(each.requires):
            return each
    missing = missing_modules(runtimes[0].requires)
    raise NotInstalledError(
        f"{artifact}: a {container.title} file is run by {runtimes[0].name}, and {', '.join(missing)} is not installed: "
        f"pip install {runtimes[0].install}",
        name=missing[0],
    )


def _designed(
    artifact: str,
    config: SelfAttentionConfig,
    params: Mapping[str, Array],
    found: Signature,
    precision: str,
    size: tuple[int, int] | None,
) -> list[Question]:
    if size is None:
        return questions(config, params, found.sizes, precision)
    if problem := _other_size(found, size):
        raise VerifyError(f"{artifact}: {problem}")
    return questions(config, params, (found.sizes[0], *size), precision)


def _own_question(
    config: SelfAttentionConfig, found: Signature, features: PathLike, array: str | None, sample: int | None
) -> Question:
    path = Path(features)
    x = read_features(path, config, array=array, sample=sample, layout=found.layout)
    if problem := _other_size(found, (x.shape[0], x.shape[1])):
        raise VerifyError(f"{path}: {problem}")
    return own_question(config, np.repeat(x[np.newaxis], found.sizes[0] or 1, axis=0), str(path))


def _other_size(found: Signature, size: tuple[int, int]) -> str:
    """Why a file does not accept maps of this size. Empty if it does."""
    pairs = zip(size, found.sizes[1:], strict=True)
    if all(fixed in (None, own) for own, fixed in pairs):
        return ""
    takes = "×".join("?" if fixed is None else str(fixed) for fixed in found.sizes[1:])
    return f"got maps of {size[0]}×{size[1]} positions; the file takes {takes}."


def _ask_all(
    process: Process,
    config: SelfAttentionConfig,
    params: Mapping[str, Array],
    found: Signature,
    precision: str,
    asked: Sequence[Question],
) -> tuple[list[Finding], list[Evidence]]:
    findings, evidence = [], []
    known: dict[tuple[int, bool], dict[str, Expectation]] = {}
    failed: set[tuple[int, ...]] = set()
    wanted = ("y",) if found.attention is None else ("y", "map")
    # The first input again at the end, because a file must not depend on earlier inputs.
    asked = (*asked, Question(f"{asked[0].name}, once more after the others", asked[0].x))
    for question in asked:
        answer = _ask(process, found, question)
        if answer.error:
            findings.append(Finding(question.name, (), answer.error))
            failed |= set() if answer.raised else {question.x.shape}
            continue
        outputs = dict(zip(wanted, _canonical(answer, found), strict=True))
        # On large maps, the definition with sums in turn takes seconds, so it runs only for files that may need it.
        for in_turn in (False, True):
            # The last question has the input of the first.
            key = (id(question.x), in_turn)
            if key not in known:
                known[key] = expected(config, params, question, precision, wanted, in_turn=in_turn)
            expectations = known[key]
            verdicts = tuple(
                measure(name, outputs[name], expectations[name], factor(precision)) for name in wanted
            )
            if all(verdict.passed for verdict in verdicts):
                break
        findings.append(Finding(question.name, verdicts))
        evidence.append(Evidence(question.x, outputs, expectations, findings[-1].passed))
    if not evidence:
        raise VerifyError(
            f"{process.artifact}: {process.runtime.name} opens it and answers nothing: {findings[0].error}"
        )
    # A runtime that crashed or did not finish has not refused an input.
    taken = {each.x.shape for each in evidence} | failed
    return [
        replace(finding, refused=question.x.shape not in taken)
        for finding, question in zip(findings, asked, strict=True)
    ], evidence


def _ask(process: Process, found: Signature, question: Question) -> Answer:
    x = np.moveaxis(question.x, 3, 1) if found.layout == "channels_first" else question.x
    names = (found.y,) if found.attention is None else (found.y, found.attention)
    try:
        return process.ask(np.ascontiguousarray(x), found.x.dtype, found.x.name, names)
    except (CrashedError, VerifyError) as error:
        return Answer(error=f"the runtime did not start again: {error}")


def _canonical(answer: Answer, found: Signature) -> list[Array]:
    y, *rest = (output.astype(np.float64) for output in answer.outputs)
    return [np.moveaxis(y, 1, 3) if found.layout == "channels_first" and y.ndim == 4 else y, *rest]


def _notes(params: Mapping[str, Array], evidence: Sequence[Evidence], allowed: float) -> Iterator[str]:
    """Notes about the limits of the verdict."""
    if not params["gamma"].any():
        yield "gamma is 0, so the function of these weights is y = x: nothing was learnt about the attention."
    elif evidence and all(_hidden(each, allowed) and "map" not in each.answers for each in evidence):
        yield "the attention adds less to x than the limits allow: nothing was learnt about it."


def _hidden(evidence: Evidence, allowed: float) -> bool:
    """Whether the identity function would also pass."""
    return measure("y", evidence.x, evidence.expectations["y"], allowed).passed
