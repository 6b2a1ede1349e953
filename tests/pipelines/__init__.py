"""Every kind of diffusers pipeline that can be built here, tiny and randomly initialised, run in
company and alone.

python -m tests.pipelines                    # all: share of merged calls, largest error, what ran
alone and why python -m tests.pipelines NAME ...           # some python -m tests.pipelines --write
--jobs 2   # all, and write docs/pipelines.md; with --resume, go on where it was interrupted
"""
