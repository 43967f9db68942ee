"""The laboratory: what labels and rewards are worth, measured where gold utility is known (`rlaif lab`).

A study is one object behind the interface `study.Study`:

    name, title   for the command line and its page
    prepare       writes the data of one seed into the seed's folder
    plan          the commands of one seed, as phases of stages (`tinyworld.stages`)
    report        what the finished seeds found: sections of tables, figures and prose (`rlaif.report.page`)

A new study is a module here with a `STUDY`, its name in `config.StudyName` and its object in `command.STUDIES`.
`command.run` does the rest: seed by seed it prepares, runs the stages that are not finished, and writes
`OUT/NAME.md`, `OUT/images/NAME-*.svg` and `OUT/NAME.html`, with seeds, machine, date and the time that it took; with
`--docs` the findings also go between the marks of `DOCS/NAME.md`.

The studies of a run share the folder of a seed, `OUT/seed-N`. Stages of the same name there are the same stage: give
one name and arguments that agree to what is to be made once, and names of their own to all others. Results that a paper
published stand beside ours in a table that `report` makes (`study.beside`).

    policies.py   studies that train policies: arms, reward models, the commands; findings.py: what they learned
    page.py       the findings as Markdown, in a page of the documentation, and as an HTML page
"""
