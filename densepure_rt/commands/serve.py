"""The command `serve`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from densepure_rt.commands.console import in_options, stderr
from densepure_rt.commands.options import (
    Alpha,
    BatchSize,
    ClassifierFile,
    Engine,
    EngineHash,
    ProviderName,
    Rule,
    Seed,
    Sigma,
    Steps,
    Threads,
    Trust,
    Votes,
    radii_of,
    say_precision,
    seconds_of,
)
from densepure_rt.errors import EnvironmentFault
from densepure_rt.optional import optional


def serve(
    engine: Engine = None,
    classifier: ClassifierFile = None,
    sigma: Sigma = 0.5,
    steps: Steps = 2,
    votes: Votes = 5,
    method: Annotated[
        str,
        typer.Option(
            help="Of certificates. sequential: which of --radii hold. radius: the largest that the time bears out."
        ),
    ] = "sequential",
    radii: Annotated[
        str | None, typer.Option(help="sequential: l2 radii with commas, in [0, 1] pixel units; default: 0 and sigma.")
    ] = None,
    radii_sigma: Annotated[str | None, typer.Option(help="The same in multiples of sigma, such as 0,0.5,1.")] = None,
    radius_loss: Annotated[
        float | None, typer.Option(help="radius: the share of it to give up for stopping early; default: 0.05.")
    ] = None,
    n: Annotated[int, typer.Option(help="Samples of a certificate at most; a prediction takes up to 1000.")] = 10_000,
    alpha: Alpha = 0.001,
    timestep_rule: Rule = None,
    batch: BatchSize = None,
    threads: Threads = None,
    provider: ProviderName = "cpu",
    engine_sha256: EngineHash = None,
    trust: Trust = False,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 for all. There is no login: others must be trusted.")
    ] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name by which it may be asked besides localhost and its address, such as a proxy's; may be repeated. "
            "Without one, a server at --host 0.0.0.0 or the like goes by any name."
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="0: any that is free; it is printed.")] = 8000,
    queue: Annotated[
        int, typer.Option(help="Images that may be open at a time; what comes beyond is told to come again (503).")
    ] = 256,
    deadline: Annotated[
        str, typer.Option(help="Time of a request that names no deadline_ms, such as 30s: then what is known so far.")
    ] = "30s",
    max_deadline: Annotated[str, typer.Option(help="Time that a request may ask for, at most.")] = "5min",
    drain: Annotated[
        str,
        typer.Option(
            help="Time to answer what is open, after SIGTERM, SIGHUP or Ctrl-C; a second one ends it. Then a batch has "
            "4 s more to end: one that hangs is left, exit code 3."
        ),
    ] = "20s",
    key: Annotated[
        Path | None,
        typer.Option(
            help="Regular file, no pipe, with the secret that keys all noise, made where there is none; default: a new "
            "one."
        ),
    ] = None,
    rotate: Annotated[
        str | None,
        typer.Option(
            help="Draw a new secret after this time, such as 24h, and keep it in --key. Under one secret wrong answers "
            "repeat: who asks about r images finds about r * alpha of them."
        ),
    ] = None,
    seed: Seed = None,
    decoders: Annotated[
        int, typer.Option(help="Processes that decode the pictures that come to /demo/; each is started when needed.")
    ] = 1,
    no_demo: Annotated[bool, typer.Option("--no-demo", help="No page at /demo/.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what comes of each request.")] = False,
    log_json: Annotated[
        Path | None, typer.Option("--log-json", help="Append what happens to this file, a JSON object a line.")
    ] = None,
) -> None:
    """Serve predictions and certificates over HTTP (Open Inference Protocol v2), with a page to try them.

    Needs pip install 'densepure-rt\\[serve]'. Ends at SIGTERM, SIGHUP or Ctrl-C, when all that is open is answered.
    """
    from densepure_rt import logs
    from densepure_rt.keys import RotatingSecret, seeded_secret
    from densepure_rt.runtime.open_device import provider_of
    from densepure_rt.smoothing.classifier import load
    from densepure_rt.smoothing.settings import Settings

    cure = "run \"pip install 'densepure-rt[serve]'\""
    with optional("serve", "Starlette, uvicorn and prometheus-client", cure):
        from densepure_rt.serving import api, server
    from densepure_rt.serving.decoders import Decoders
    from densepure_rt.serving.origins import hosts_of
    from densepure_rt.serving.service import Service

    logs.set_up(verbose, log_json, in_options)
    asked: dict[str, Any] = {"method": method, "radii": radii_of(radii, radii_sigma, sigma), "radius_loss": radius_loss}
    asked |= {"sigma": sigma, "steps": steps, "votes": votes, "n": n, "alpha": alpha, "timestep_rule": timestep_rule}
    settings = Settings(**asked)
    deadlines = api.Deadlines(seconds_of(deadline, "--deadline"), seconds_of(max_deadline, "--max-deadline"))
    say_precision(engine, provider)
    drain_seconds, lifetime = seconds_of(drain, "--drain"), seconds_of(rotate, "--rotate")
    pictures = Decoders(decoders)
    secret = RotatingSecret(key, lifetime, None if seed is None else seeded_secret(seed))
    if seed is not None:
        stderr.print("seed public: answers are valid only for images fixed before the seed was chosen")
    with (
        server.listen(host, port) as listener,
        load(
            engine,
            classifier,
            batch=batch,
            threads=threads,
            provider=provider,
            engine_sha256=engine_sha256,
            trust=trust,
        ) as smoothed,
        Service(smoothed, settings, secret, queue) as service,
    ):
        names = hosts_of(listener.getsockname()[0], allow_host or ())
        app = api.make_app(service, deadlines, not no_demo, provider_of(provider), names, pictures)
        at = server.address(listener)

        def started() -> None:
            print(f"serving predict and certify at {at}" + ("" if no_demo else f", a page at {at}/demo/"), flush=True)

        server.run(app, service, listener, drain_seconds, started, pictures)
        if service.stuck:  # its engines cannot be closed, nor would Python end
            logging.shutdown()
            os._exit(EnvironmentFault.exit_code)
