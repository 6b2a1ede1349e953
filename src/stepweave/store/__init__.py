"""What outlives a request: records of jobs, image files, and the directory that holds both.

Works alone, without a server: nothing here imports torch or a route.
"""

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
