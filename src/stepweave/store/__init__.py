"""Stores of job records and image files, and the directory of both. Usable without a server."""

from stepweave.store.directory import state_directory
from stepweave.store.files import DirectoryFileStore, FileStore, StoredFile
from stepweave.store.health import REASONS, FreeBytes, StoreHealth
from stepweave.store.jobs import JobRecord, JobStore, SqliteJobStore

__all__ = [
    "REASONS",
    "DirectoryFileStore",
    "FileStore",
    "FreeBytes",
    "JobRecord",
    "JobStore",
    "SqliteJobStore",
    "StoreHealth",
    "StoredFile",
    "state_directory",
]
