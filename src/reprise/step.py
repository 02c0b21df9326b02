from reprise.engine.scheduler import ScheduledRequest, ScheduledStep  # noqa
