"""Every kind of diffusers pipeline that can be built here, tiny and randomly initialised, run in company and alone.

python -m tests.pipelines            # all, on the terminal: share of merged calls, largest error, what ran alone and why
python -m tests.pipelines NAME ...   # some
"""
