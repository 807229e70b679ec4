"""gunicorn's settings for gpumgr, each with its reason. The hazards were measured with gunicorn 23.0 and 27.0,
2026-08 to 2026-11; tests/e2e holds the ones that matter.

gunicorn is pinned to 23.x in setup.cfg. Known of newer ones: from 25.3 on a silent connection occupies a thread of
the pool for 5 s (a renew then waits behind idle connections), and from 26.0 on closing a connection may block the
main loop for up to 2 s per client that keeps its end open. 23.0 does neither.
"""

import gpumgr.wiring  # noqa: F401 - only imported, in the master: a worker that must be replaced serves 0.2 s sooner
from gpumgr.web import server, systemd

# Before anything else: gunicorn would tell systemd READY=1 itself when it has opened the port, without a worker.
systemd.manager()
settings = server.settings_or_exit()  # here and not in a hook: only here does exit code 2 reach the shell

bind = settings.server.bind
proc_name = "gpumgr"

# One process holds the leases; a second worker would grant the same GPU again.
workers = 1
# gthread; this subclass of it has its threads from the start, lets renews on kept connections go ahead of newcomers,
# and does not look at every waiting request whenever any request ends.
worker_class = "gpumgr.web.worker.LeaseWorker"
# Waiters cost a thread each; threads - reserved_threads of them may wait, the rest answer renew, release and status.
threads = settings.server.threads
# Counts open connections, kept-alive ones too. At the limit gunicorn stops accepting, renews included; without a free
# descriptor its worker dies, so that the limit stays below the process's own.
worker_connections = min(max(4096, 2 * threads), server.raise_descriptor_limit() - 128)
# Who connects waits here until the main loop accepts it, some 1 ms each while it is busy. Beyond the backlog (or the
# system's net.core.somaxconn) a connect is dropped, and its caller's system tries again after a second.
backlog = 2048

# Not a request time-out (gthread beats from its main loop, whatever the requests do): it ends a stuck main loop.
timeout = 60
# Waiters are answered at SIGTERM, so that this only bounds answers on their way out.
graceful_timeout = 10
# Longer than a holder's pause between two renews (TTL/3 of the default 120 s is 40 s), so that a renew finds its
# connection open: with gunicorn's 2 s, 30 of 360 requests of pooled clients met a closing connection.
keepalive = 75
# A worker that ends after N requests would cut everybody who waits or streams.
max_requests = 0
# By default gunicorn believes callers on loopback that say in headers SCRIPT_NAME and PATH_INFO what their path is.
forwarder_headers = ""
# Threads started at import would live in the master, not in the worker.
preload_app = False
# The heartbeat file on a disk could block the main loop when the disk does.
worker_tmp_dir = "/dev/shm"  # noqa: S108 - gunicorn makes its own private file there
# Tokens are in paths: this logger takes them out. No access log by default.
logger_class = server.TokenlessLogger
accesslog = None


def when_ready(arbiter):  # type: ignore[no-untyped-def]
    """A second worker would grant the GPU twice: neither `--workers 2` nor a signal brings one."""
    server.ignore_worker_count_signals()
    server.forget_secrets(arbiter)
    server.require_private_listeners(arbiter)
    systemd.tell_signals()
    if arbiter.cfg.workers != 1:
        arbiter.log.error("gpumgr needs exactly one worker, not %s: remove --workers", arbiter.cfg.workers)
        arbiter.halt(exit_status=2)


def post_fork(_arbiter, _worker):  # type: ignore[no-untyped-def]
    server.die_with_master()


def post_worker_init(worker):  # type: ignore[no-untyped-def]
    """In the worker, after the fork and before the first connection: where threads may start."""
    broker = worker.wsgi.extensions["gpumgr"]
    server.spare_collector()
    server.start_worker(broker, wait_seconds=graceful_timeout + 5)
    systemd.start(broker, worker.sockets[0].getsockname())


def worker_exit(_arbiter, worker):  # type: ignore[no-untyped-def]
    broker = getattr(worker.wsgi, "extensions", {}).get("gpumgr") if hasattr(worker, "wsgi") else None
    if broker is not None:
        broker.close(timeout_seconds=0.5)
