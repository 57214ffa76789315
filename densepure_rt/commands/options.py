"""Groups of options that commands take whole, declared once for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from densepure_rt import logs
from densepure_rt.commands.config import read_config
from densepure_rt.commands.console import in_options, stderr
from densepure_rt.commands.from_run import PRESET, taken
from densepure_rt.commands.groups import Elsewhere, TypedOptions
from densepure_rt.commands.values import batch_of, folder_of, none_as, radii_of
from densepure_rt.errors import UsageError
from densepure_rt.optional import optional

if TYPE_CHECKING:
    from densepure_rt.runtime.schedule import TimestepRule
    from densepure_rt.smoothing.certificate import Method
    from densepure_rt.smoothing.classifier import SmoothedClassifier
    from densepure_rt.smoothing.settings import Settings

# The panels of --help.
IMAGES, SAMPLING, CERTIFICATES, ENGINES = "Images", "Noise and votes", "Certificates", "Engines"
SECRET, CLUSTER, RESULTS, MESSAGES = "Secret", "Cluster", "Results", "Messages"

ProviderName = Annotated[
    str,
    typer.Option(
        "--provider", help="Where ONNX Runtime runs .onnx engines: cpu, cuda or tensorrt.", rich_help_panel=ENGINES
    ),
]
RunImages = Annotated[
    Path | None, typer.Option(help="The images that were certified. Default: those that the run names.")
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]  # of every command
EngineFile = Annotated[
    Path | None,
    typer.Option(
        "--engine", help="Step engine (ONNX file or plan), or the folder of its bundle. Default: the shipped one."
    ),
]


@dataclass(frozen=True)
class EngineOptions(TypedOptions):
    """Which engines to open, and what runs them."""

    engine: Annotated[
        Path | None,
        typer.Option(
            help="Step engine, such as mymodel/unet.onnx, or the folder of its bundle. Default: the shipped one.",
            rich_help_panel=ENGINES,
        ),
    ] = None
    classifier: Annotated[
        Path | None,
        typer.Option(
            help="Classifier engine. Default: the one named in the sidecar of the step engine.", rich_help_panel=ENGINES
        ),
    ] = None
    provider: ProviderName = "cpu"
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Images per call of the engine. Part of the run's identity if the bits of a result depend on it. "
            "auto: the fastest, timed once and remembered. Default: 32, or the batch that a plan was built for.",
            rich_help_panel=ENGINES,
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(
            help="Threads that call the engine. Default: one per core, two on a GPU.", rich_help_panel=ENGINES
        ),
    ] = None
    engine_sha256: Annotated[
        str | None,
        typer.Option(help="Refuse the engine unless its SHA-256 is this one.", rich_help_panel=ENGINES),
    ] = None
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="Accept a plan without a sidecar. A plan is code for the GPU: trust its source.",
            rich_help_panel=ENGINES,
        ),
    ] = False

    def open(self, secret: bytes | None) -> SmoothedClassifier:
        """Open the engines. secret: what keys the noise; None for a new one."""
        from densepure_rt.smoothing.classifier import load

        self.say_precision()
        return load(
            self.engine,
            self.classifier,
            secret=secret,
            batch=None if self.batch is None else batch_of(self.batch),
            threads=self.threads,
            provider=self.provider,
            engine_sha256=self.engine_sha256,
            trust=self.trust,
        )

    def say_precision(self) -> None:
        """Say that the model that ships is no float32 one on a GPU."""
        from densepure_rt.runtime.bundle import ON_GPU, shipped_engine
        from densepure_rt.runtime.open_device import provider_of

        if self.engine is None and provider_of(self.provider) != "cpu":
            stderr.print(
                f"with --provider {self.provider} the model that ships runs in {ON_GPU}: --engine {shipped_engine()} "
                f"is float32"
            )


@dataclass(frozen=True)
class SamplingOptions(TypedOptions):
    """The noise, reverse steps and votes of a sample, and how often an answer may be wrong."""

    sigma: Annotated[
        float,
        typer.Option(
            help="Standard deviation of the smoothing noise, in [0, 1] pixel units.", rich_help_panel=SAMPLING
        ),
    ] = 0.5
    steps: Annotated[
        int,
        typer.Option(
            help="Reverse steps (b). 1: one-shot denoising; 0: the classifier alone, plain smoothing.",
            rich_help_panel=SAMPLING,
        ),
    ] = 2
    votes: Annotated[int, typer.Option(help="Votes per noise sample (K).", rich_help_panel=SAMPLING)] = 5
    timestep_rule: Annotated[
        str | None,
        typer.Option(
            help="Rule that maps sigma to a timestep: nearest, or as published densepure or carlini. Default: the "
            "engine's.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    alpha: Annotated[
        float,
        typer.Option(help="Maximum probability that an image gets a wrong answer.", rich_help_panel=SAMPLING),
    ] = 0.001


@dataclass(frozen=True)
class PredictionOptions(SamplingOptions):
    """The options of a smoothed prediction."""

    n: Annotated[
        int,
        typer.Option(help="Maximum number of samples per image. 13 that agree are enough.", rich_help_panel=SAMPLING),
    ] = 1000

    def settings(self) -> Settings:
        """Return what the options ask for. Raises UsageError."""
        from densepure_rt.smoothing.settings import Settings

        return noted(
            Settings(
                self.sigma,
                self.steps,
                self.votes,
                n=self.n,
                alpha=self.alpha,
                timestep_rule=cast("TimestepRule | None", self.timestep_rule),
            )
        )


@dataclass(frozen=True)
class CertificateOptions(SamplingOptions):
    """The options of a certificate by a rule that may stop at any sample."""

    method: Annotated[
        str,
        typer.Option(
            help="sequential: stop as soon as it is clear which of --radii hold. radius: stop near the largest radius.",
            rich_help_panel=CERTIFICATES,
        ),
    ] = "sequential"
    radii: Annotated[
        str | None,
        typer.Option(
            help="sequential: l2 radii separated by commas, in [0, 1] pixel units. Default: 0 and sigma.",
            rich_help_panel=CERTIFICATES,
        ),
    ] = None
    radii_sigma: Annotated[
        str | None,
        typer.Option(help="sequential: the same in multiples of sigma, such as 0,0.5,1.", rich_help_panel=CERTIFICATES),
    ] = None
    radius_loss: Annotated[
        float | None,
        typer.Option(
            help="radius: share of the radius to give up for stopping early. Default: 0.05.",
            rich_help_panel=CERTIFICATES,
        ),
    ] = None
    n: Annotated[int, typer.Option(help="Maximum number of samples per image.", rich_help_panel=CERTIFICATES)] = 10_000

    def settings(self) -> Settings:
        """Return what the options ask for. Raises UsageError."""
        from densepure_rt.smoothing.settings import Settings

        return Settings(
            self.sigma,
            self.steps,
            self.votes,
            n=self.n,
            alpha=self.alpha,
            method=cast("Method", self.method),
            radii=radii_of(self.radii, self.radii_sigma, self.sigma),
            radius_loss=self.radius_loss,
            timestep_rule=cast("TimestepRule | None", self.timestep_rule),
        )


@dataclass(frozen=True)
class RunOptions(CertificateOptions):
    """The options of the certificates of a run, by any rule."""

    method: Annotated[
        str,
        typer.Option(
            help="sequential: stop as soon as it is clear which of --radii hold. radius: stop near the largest "
            "radius. fixed: Cohen et al. 2019, n0 and n samples per image. The first two test only the label "
            "of a labelled image; that label must not come from a run with the same secret.",
            rich_help_panel=CERTIFICATES,
        ),
    ] = "sequential"
    n: Annotated[
        int,
        typer.Option(
            help="Maximum number of samples per image. fixed: samples that bound the probability of the class.",
            rich_help_panel=CERTIFICATES,
        ),
    ] = 10_000
    n0: Annotated[
        int,
        typer.Option(help="fixed: samples that select the class, before the n others.", rich_help_panel=CERTIFICATES),
    ] = 100
    preset: Annotated[
        str | None,
        typer.Option(
            help="paper: the published settings, --method fixed --steps 10 --votes 40 --n0 100 --n 100000.",
            rich_help_panel=CERTIFICATES,
        ),
    ] = None

    def settings(self) -> Settings:
        """Return what the options ask for. A preset gives way to options that were typed. Raises UsageError."""
        from densepure_rt.smoothing.settings import PAPER, RULES

        if self.preset not in (None, "paper"):
            raise UsageError(f"--preset {self.preset} is not known: paper is the only one")
        if self.preset == "paper":
            filled = {name: getattr(PAPER, name) for name in PRESET if name not in self.typed}
            return dataclasses.replace(self, **filled, preset=None, typed=self.typed - {"n0"}).settings()
        found = super().settings()
        if RULES[found.method].anytime and "n0" in self.typed:
            raise UsageError(f"--n0 is of --method fixed alone, and {self.method} was asked for: leave it out")
        return noted(dataclasses.replace(found, n0=self.n0))


@dataclass(frozen=True)
class SecretOptions(TypedOptions):
    """The options of the secret that keys all noise."""

    seed: Annotated[
        int | None,
        typer.Option(
            help="Public seed, for reproduction. Default: a new secret from the system.", rich_help_panel=SECRET
        ),
    ] = None
    key: Annotated[
        Path | None,
        typer.Option(
            help="File with the secret that keys all noise; made if it does not exist. Not with --seed. Revealing "
            "one run publishes the secret of all runs with the same key file.",
            rich_help_panel=SECRET,
        ),
    ] = None

    def secret(self, run: Path | None = None) -> bytes | None:
        """Return what keys the noise; None for a new secret. run: a folder whose run may have one already."""
        from densepure_rt.keys import seeded_secret
        from densepure_rt.runs.secret import agreed_secret

        if self.seed is not None and self.key is not None:
            raise UsageError("--seed and --key are two ways to say what keys the noise: give one")
        return agreed_secret(run, self.key) if self.seed is None else seeded_secret(self.seed)


@dataclass(frozen=True)
class ClusterOptions(TypedOptions):
    """Which machines draw the samples."""

    cluster: Annotated[
        str | None,
        typer.Option(
            help="ray: use this machine's cores, or the cluster of RAY_ADDRESS. ray://HOST:PORT: use that cluster. "
            "There is one worker per GPU, or per --threads CPUs (1). Each opens --engine on its own machine. "
            "No result depends on it.",
            rich_help_panel=CLUSTER,
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(help="Number of workers. Default: as many as there is room for.", rich_help_panel=CLUSTER),
    ] = None
    group: Annotated[
        str | None,
        typer.Option(
            help="If the machines are of several kinds: use those whose hash begins with this. Default: the "
            "largest group.",
            rich_help_panel=CLUSTER,
        ),
    ] = None

    def check(self) -> None:
        """Raise UsageError for options of a cluster where none is named."""
        if self.cluster is None and (self.workers, self.group) != (None, None):
            raise UsageError("--workers and --group are of --cluster: name one, such as --cluster ray")

    def open(self, engines: EngineOptions, secret: bytes | None) -> SmoothedClassifier:
        """Open the engines, here or by workers of the cluster; their paths are those of the workers' machines then."""
        if self.cluster is None:
            return engines.open(secret)
        with optional("--cluster", "Ray", "run \"pip install 'densepure-rt[cluster]'\""):
            from densepure_rt.cluster import ray_workers
        engines.say_precision()
        engine, classifier = (path and path.absolute() for path in (engines.engine, engines.classifier))
        if (batch := None if engines.batch is None else batch_of(engines.batch)) == "auto":
            raise UsageError("--batch auto times this machine, and --cluster has others: give a number")
        threads = none_as(1, engines.threads)
        recipe = ray_workers.WorkerEngines(
            engine, classifier, batch, threads, engines.provider, engines.engine_sha256, engines.trust
        )
        return ray_workers.open_on_cluster(self.cluster, recipe, self.workers, self.group, secret)


@dataclass(frozen=True)
class MessageOptions(TypedOptions):
    """The messages of a command while it works."""

    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Print the result of each image or request.", rich_help_panel=MESSAGES),
    ] = False
    log_json: Annotated[
        Path | None,
        typer.Option(help="Append a log to this file, one JSON object per line.", rich_help_panel=MESSAGES),
    ] = None

    def set_up(self) -> None:
        """Send what is logged where the options say, in the words of the command line."""
        logs.set_up(self.verbose, self.log_json, in_options)


@dataclass(frozen=True)
class RunMessageOptions(MessageOptions):
    """The messages of a run while it works."""

    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="Print only results, warnings and errors.", rich_help_panel=MESSAGES),
    ] = False


@dataclass(frozen=True)
class OutputOptions(TypedOptions):
    """The place of a run's results."""

    out: Annotated[
        Path | None,
        typer.Option(
            parser=folder_of,
            metavar="PATH",
            help="Folder for the results. A run in it is continued. Default: a new one, runs/certify-TIME.",
            rich_help_panel=RESULTS,
        ),
    ] = None
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --out with the options that it was started with.",
            rich_help_panel=RESULTS,
        ),
    ] = False
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the cost and the largest possible radius; certify nothing.",
            rich_help_panel=RESULTS,
        ),
    ] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel=RESULTS)
    ] = False
    config: Annotated[
        Path | None,
        typer.Option(
            help='TOML file of options, such as sigma = 0.25 or run-budget = "2h". Options that you type override it.',
            rich_help_panel=RESULTS,
        ),
    ] = None
    save_config: Annotated[
        Path | None,
        typer.Option(help="Write the options of this run to a file that --config reads.", rich_help_panel=RESULTS),
    ] = None

    def check(self) -> None:
        """Raise UsageError for a run that goes on nowhere."""
        if self.resume and self.out is None:
            raise UsageError("--resume goes on with a run: name its folder with --out")

    def elsewhere(self) -> Iterator[Elsewhere]:
        """Take options from --config, and those of a run that goes on, or is attacked, from its manifest."""
        configured = {} if self.config is None else read_config(self.config)
        if self.config is not None:
            yield Elsewhere(str(self.config), configured, as_typed=True)
        if self.out is not None and (self.resume or "falsify" in self.typed):
            yield from taken(self.out, self.typed, frozenset(configured))


def noted(settings: Settings) -> Settings:
    """Say when votes are of no use, and return the settings."""
    if settings.effective.votes < settings.votes:
        stderr.print(f"with --steps {settings.steps} nothing is random after the smoothing noise: votes set to 1")
    return settings
