"""WordNet noun glosses with their class, the data set that ships with the package.

Only data: read it with ``pomona.datasets.load_dataset("wordnet-nouns", split="train")``. ``README.md`` says
what is in it and how it was built, ``LICENSE-WORDNET`` under which terms.
"""
