"""The chores that a Ray of our own does seldom, or not at all: they take CPU from the engine's threads.

On two cores Ray's processes took 8 % of one while nothing happened, most of it for readers that are not
there: no dashboard runs, no driver listens to logs, nobody scrapes Ray's own metrics, and nodes do not come
and go. None of this notices a death: workers, raylet and GCS tell each other by sockets and by health checks,
which keep their pace. Names and defaults are those of Ray 2.60 (`ray_config_def.h`,
`serve/_private/constants.py`, and the modules named below). What stands in the environment of `up` goes
before; a Ray that is joined keeps its own.
"""

from __future__ import annotations

SELDOM_S = "600"
SELDOM_MS = "600000"

RAY_CHORES = {
    # Serve's controller looks at all replicas every 0.1 s, with three calls to the GCS each time. A replica
    # that is placed again waits for three such looks: at most 0.45 s more, of the seconds its start takes.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
    # The counters of requests that pass through Serve, of which there are none, every 0.1 s.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": SELDOM_MS,
    # Times of every handler of every event loop, metrics and task histories, for the dashboard.
    "RAY_event_stats": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_io_context_monitor_probe_interval_ms": "10000",
    # The raylet's rounds, of 0.1 to 0.25 s: idle workers, full disks, objects to pull or free, full memory.
    "RAY_kill_idle_workers_interval_ms": "1000",
    "RAY_local_fs_monitor_interval_ms": "1000",
    "RAY_object_manager_timer_freq_ms": "1000",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "RAY_memory_monitor_refresh_ms": "1000",
    # The dashboard's agent (dashboard/modules/event, dashboard/modules/reporter): events and the state of the
    # host, every 0.1 to 5 s, for a dashboard.
    "EVENT_AGENT_REPORT_INTERVAL_SECONDS": SELDOM_S,
    "SCAN_EVENT_DIR_INTERVAL_SECONDS": SELDOM_S,
    "REPORTER_UPDATE_INTERVAL_MS": SELDOM_MS,
    # The log monitor (_private/log_monitor.py) lists the log files every 0.1 s and sends new lines to
    # drivers; ours does not listen. Where there are more files than the threshold the interval counts.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": SELDOM_S,
    # The autoscaler of nodes (autoscaler/_private/monitor.py): there is this one.
    "AUTOSCALER_UPDATE_INTERVAL_S": SELDOM_S,
}
