"""Every pipeline of tests/pipelines that makes images, saved to a directory, served from there, and
asked over HTTP for all its inputs.

python -m tests.served                    # all
python -m tests.served NAME ...           # some
python -m tests.served --write --jobs 2   # all, and write their table in docs/pipelines.md; with
                                          # --resume, go on where it was interrupted
"""
