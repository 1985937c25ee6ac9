"""Stage evaluate: metrics and task scores of the full-precision model and of every slice."""

from collections.abc import Iterator, Sequence

from matquant.distributed import ProcessGroup
from matquant.evaluate.metrics import Metrics
from matquant.evaluate.slices import WeightsOf, evaluate_slices, steps
from matquant.evaluate.tasks import Scores, Tasks, evaluate_tasks
from matquant.formats.slice_spec import SliceSpec
from matquant.models.token_ids import check_token_ids, has_foreign_tokens
from matquant.stages.load import LoadedJob
from matquant.stages.runtime import Runtime


def load_tasks(job: LoadedJob) -> Tasks | None:
    """Load the lm-eval tasks of a job before any long work; None without any.

    Raises:
        UserError: a task cannot be loaded, or has a token that the model has no embedding for.
    """
    asked = job.config.eval
    if not asked.tasks or "evaluate" not in job.config.stages:
        return None
    tasks = Tasks(asked.tasks, asked.task_folder, asked.fewshot)
    if has_foreign_tokens(job.model):
        for task, text in tasks.texts(asked.limit):
            check_token_ids(job.model, job.model.tokenizer(text)["input_ids"], f"The task {task} of eval.tasks")
    return tasks


def evaluate(job: LoadedJob, slices: Sequence[SliceSpec], runtime: Runtime) -> Iterator[tuple[str, dict[str, Metrics]]]:
    """Yield each dataset with the metrics of the full-precision model and of every slice, by their names.

    Nothing is yielded without the stage evaluate.
    """
    by_name = {one.name: one for one in slices}
    yield from evaluate_weights(job, lambda index, name: by_name[name].weights(index), list(by_name), runtime)


def evaluate_weights(
    job: LoadedJob,
    weights_of: WeightsOf,
    names: Sequence[str],
    runtime: Runtime,
    process_group: ProcessGroup | None = None,
) -> Iterator[tuple[str, dict[str, Metrics]]]:
    """Yield each dataset with the metrics of the full-precision model and of models that differ in their weights.

    Args:
        weights_of: weights of a block of a model, see ``evaluate_slices``.
        names: of the models.
        process_group: processes that share the sequences; None for those of the job.
    """
    group = runtime.process_group if process_group is None else process_group
    for name, sequences in job.evaluation.items():
        with runtime.bars.bar(f"evaluate on {name}", steps(job.blocks, sequences, names)) as progress:
            measured = evaluate_slices(
                job.blocks,
                sequences,
                weights_of,
                names,
                job.config.eval.datasets[name].batch_size,
                runtime.device,
                job.evaluation_dtype,
                progress,
                job.offload_target(runtime, sequences, 1 + len(names), job.evaluation_dtype),
                group,
            )
        yield name, measured


def score_tasks(
    job: LoadedJob, tasks: Tasks | None, slices: Sequence[SliceSpec], runtime: Runtime
) -> Iterator[tuple[str, Scores]]:
    """Yield the name and the task scores of the full-precision model and of every slice; nothing without tasks."""
    if tasks is None:
        return
    by_name = {one.name: one for one in slices}
    with runtime.bars.bar("tasks", len(slices) + 1) as progress:
        yield from evaluate_tasks(
            tasks,
            job.blocks,
            job.model.tokenizer,
            lambda index, name: by_name[name].weights(index),
            list(by_name),
            limit=job.config.eval.limit,
            batch_size=job.config.eval.task_batch_size,
            device=runtime.device,
            progress=progress,
        )
