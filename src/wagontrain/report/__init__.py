"""A run's files as a page to read, and as a trace to look through.

    reading    a run directory as plain data, also of a run that crashed or goes on
    series     long curves made short
    pictures   figures, as what plotly's script draws
    tables     rows of text
    page       all of it in one file
    tracing    the same run for a trace viewer

Nothing here knows anything of a run but its files.
"""
