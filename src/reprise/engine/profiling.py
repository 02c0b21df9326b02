"""Recording what host and device do, for Chrome's or Perfetto's trace viewer."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, supported_activities

from reprise.errors import ConfigError, RepriseError
from reprise.platforms import Platform

logger = logging.getLogger(__name__)

DEFAULT_DIRECTORY = "reprise-profile"


class Profiler:
    """Records from :meth:`start` to :meth:`stop`, in the thread that calls both.

    Args:
        platform: Whose device is recorded too.
    """

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._running: profile | None = None
        self._directory = Path()

    @property
    def running(self) -> bool:
        return self._running is not None

    def start(self, directory: str | os.PathLike[str] | None) -> None:
        """Begin.

        Args:
            directory: Where :meth:`stop` writes; None: ``REPRISE_PROFILE_DIR``, or
                ``reprise-profile`` in the working directory.

        Raises:
            RepriseError: It records already.
            ConfigError: The directory cannot be written.
        """
        if self._running is not None:
            raise RepriseError("a profile is being recorded; call stop_profile() first")
        chosen = directory or os.environ.get("REPRISE_PROFILE_DIR") or DEFAULT_DIRECTORY
        self._directory = Path(chosen).expanduser()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"directory={str(self._directory)!r} cannot be made ({error}); "
                "give start_profile() another one, or set REPRISE_PROFILE_DIR"
            ) from error
        activities = supported_activities()
        if not self._platform.asynchronous:
            # The profiler may know another device than the one that computes.
            activities = {ProfilerActivity.CPU}
        recording = profile(activities=activities)
        recording.start()
        self._running = recording
        logger.info("profile: recording, for a file in %s", self._directory)

    def stop(self) -> Path:
        """End, and write the trace.

        Returns:
            The file: ``PID-TIME.json.gz``.

        Raises:
            RepriseError: Nothing is being recorded, or the file could not be written.
        """
        if self._running is None:
            raise RepriseError("no profile is being recorded; call start_profile() first")
        recording, self._running = self._running, None
        self._platform.synchronize()
        recording.stop()
        file = self._directory / f"{os.getpid()}-{time.time_ns()}.json.gz"
        recording.export_chrome_trace(str(file))
        if not file.exists():  # torch does not tell
            raise RepriseError(f"the profile could not be written to {str(file)!r}")
        logger.info("profile: written to %s", file)
        return file
