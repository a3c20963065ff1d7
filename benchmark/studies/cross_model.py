"""The table of all cache methods on all shipped model families.

Every family is a comparison at its usual number of steps, with the options of a configuration
file, in a directory of its own. The table is written from their results.
"""

from rich.console import Console

from benchmark.errors import BenchmarkError
from benchmark.models.families import FAMILIES
from benchmark.models.loading import load_documented, load_prompts
from benchmark.models.names import LEARNED
from benchmark.report.markers import PAGE
from benchmark.report.reading import read_results
from benchmark.run.store import Store
from benchmark.run.sweep import stored_plan
from benchmark.settings import Settings
from benchmark.studies import compare
from benchmark.studies.catalogue import CrossModelOptions
from benchmark.studies.cross_report import update_results, write_report


def family_settings(settings: Settings, options: CrossModelOptions) -> list[Settings]:
    """One run for each family, checked as far as can be before anything is run.

    Raises:
        BenchmarkError: an argument is wrong, a pipeline is missing, a directory is taken.
    """
    shipped = [name for name in FAMILIES if (options.pipelines / name).is_dir()]
    chosen = list(dict.fromkeys(options.families or shipped))
    missing = [name for name in chosen if name not in shipped]
    if missing or not chosen:
        raise BenchmarkError(
            f"--families: no pipeline of {', '.join(missing) or 'any family'} in "
            f"{options.pipelines}; accepted: {', '.join(shipped) or 'none'}"
        )
    runs = []
    for name in chosen:
        output, model = settings.output_dir / name, options.pipelines / name
        family = FAMILIES[name]
        planned = stored_plan(model, family.steps, family.guidance_scale) is not None
        methods = [each for each in settings.cache_methods if each != LEARNED or planned]
        run = Settings(
            model_type=name,
            model=str(model),
            config=str(options.configs / f"{name}.yaml"),
            output_dir=output,
            resume=settings.resume and (output / "rows" / "settings.json").is_file(),
            enable_adacorrection=True,
            cache_methods=tuple(methods),
            num_prompts=settings.num_prompts,
            repetitions=settings.repetitions,
            warmup=settings.warmup,
            device=settings.device,
            threads=settings.threads,
            workers=settings.workers,
        )
        Store(output).check(run.resume)
        load_documented(run)
        load_prompts(run)
        runs.append(run)
    return runs


def run(settings: Settings, options: CrossModelOptions, console: Console) -> None:
    """Run the families one after the other, then write the table."""
    if options.update_results:
        update_results(PAGE, settings.output_dir)
        return
    runs = family_settings(settings, options)
    for each in runs:
        compare.run(each, console)
    documents = {each.model_type: read_results(each.output_dir / "results.json") for each in runs}
    console.print(write_report(settings.output_dir, documents).rich())
    console.print(f"Table: {settings.output_dir / 'cross_model.md'}", soft_wrap=True)
