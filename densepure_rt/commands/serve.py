"""`densepure-rt serve`: predictions and certificates over HTTP."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from densepure_rt.commands.console import stderr
from densepure_rt.commands.groups import with_options
from densepure_rt.commands.options import SECRET, CertificateOptions, EngineOptions, MessageOptions, SecretOptions
from densepure_rt.commands.values import seconds_of
from densepure_rt.errors import EnvironmentFault
from densepure_rt.optional import optional

if TYPE_CHECKING:
    from densepure_rt.keys import RotatingSecret

SERVER, LIMITS = "Server", "Limits"  # panels of --help


@dataclass(frozen=True)
class ServerSecretOptions(SecretOptions):
    """The options of the secret that keys all noise of a server."""

    key: Annotated[
        Path | None,
        typer.Option(
            help="File with the secret that keys all noise; made if it does not exist. Default: a new secret that "
            "is not kept.",
            rich_help_panel=SECRET,
        ),
    ] = None
    rotate: Annotated[
        str | None,
        typer.Option(
            help="Draw a new secret after this time, such as 24h, and write it to --key. Under one secret wrong "
            "answers repeat: a client that asks about r images finds about r * alpha of them.",
            rich_help_panel=SECRET,
        ),
    ] = None

    def rotating(self) -> RotatingSecret:
        """Return the secret of the server, and say so where it is public."""
        from densepure_rt.keys import RotatingSecret, seeded_secret

        public = None if self.seed is None else seeded_secret(self.seed)
        found = RotatingSecret(self.key, seconds_of(self.rotate, "--rotate"), public)
        if public is not None:
            stderr.print("seed public: answers are valid only for images fixed before the seed was chosen")
        return found


@dataclass(frozen=True)
class ServerOptions:
    """The address of a server and the load that it takes."""

    host: Annotated[
        str,
        typer.Option(
            help="Address to listen at; 0.0.0.0 for all. There is no login: anyone who can reach the address can ask.",
            rich_help_panel=SERVER,
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int, typer.Option(help="Port to listen at. 0: any free port, which is printed.", rich_help_panel=SERVER)
    ] = 8000
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name that requests may use besides localhost and the address, such as a proxy's; "
            "repeatable. Without it, a server at --host 0.0.0.0 accepts any name.",
            rich_help_panel=SERVER,
        ),
    ] = None
    no_demo: Annotated[
        bool, typer.Option("--no-demo", help="Serve no demo page at /demo/.", rich_help_panel=SERVER)
    ] = False
    queue: Annotated[
        int,
        typer.Option(
            help="Maximum number of open images. Further requests get 503 with Retry-After.",
            rich_help_panel=LIMITS,
        ),
    ] = 256
    deadline: Annotated[
        str,
        typer.Option(
            help="Deadline of a request without deadline_ms, such as 30s. When it is up, the answer is what is "
            "known so far.",
            rich_help_panel=LIMITS,
        ),
    ] = "30s"
    max_deadline: Annotated[
        str, typer.Option(help="Longest deadline that a request may ask for.", rich_help_panel=LIMITS)
    ] = "5min"
    drain: Annotated[
        str,
        typer.Option(
            help="Time to answer open requests after SIGTERM, SIGHUP or Ctrl-C; a second signal ends it. A running "
            "batch then has 4 s; if it hangs, the exit code is 3.",
            rich_help_panel=LIMITS,
        ),
    ] = "20s"
    decoders: Annotated[
        int,
        typer.Option(
            help="Number of processes that decode pictures. Each is started when it is needed.",
            rich_help_panel=LIMITS,
        ),
    ] = 1


@with_options
def serve(
    asked: CertificateOptions,
    engines: EngineOptions,
    place: ServerOptions,
    noise: ServerSecretOptions,
    messages: MessageOptions,
) -> None:
    """Serve predictions and certificates over HTTP (Open Inference Protocol v2), with a page to try them.

    Needs pip install 'densepure-rt\\[serve]'. Ends at SIGTERM, SIGHUP or Ctrl-C, when all that is open is answered.
    """
    from densepure_rt.runtime.open_device import provider_of

    cure = "run \"pip install 'densepure-rt[serve]'\""
    with optional("serve", "Starlette, uvicorn and prometheus-client", cure):
        from densepure_rt.serving import api, server
        from densepure_rt.serving.decoders import Decoders
        from densepure_rt.serving.origins import hosts_of
        from densepure_rt.serving.service import Service

    messages.set_up()
    settings = asked.settings()
    deadlines = api.Deadlines(
        seconds_of(place.deadline, "--deadline"), seconds_of(place.max_deadline, "--max-deadline")
    )
    drain_seconds = seconds_of(place.drain, "--drain")
    pictures = Decoders(place.decoders)
    secret = noise.rotating()
    with (
        server.listen(place.host, place.port) as listener,
        engines.open(secret=None) as smoothed,
        Service(smoothed, settings, secret, place.queue) as service,
    ):
        names = hosts_of(listener.getsockname()[0], place.allow_host or ())
        app = api.make_app(service, deadlines, not place.no_demo, provider_of(engines.provider), names, pictures)
        at = server.address(listener)
        page = "" if place.no_demo else f", a page at {at}/demo/"

        def started() -> None:
            print(f"serving predict and certify at {at}{page}", flush=True)

        server.run(app, service, listener, drain_seconds, started, pictures)
        if service.stuck:  # its engines cannot be closed, nor would Python end
            logging.shutdown()
            os._exit(EnvironmentFault.exit_code)
