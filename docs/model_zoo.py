"""Print the tables of the model zoo, made from the metafiles.

    python docs/model_zoo.py

The site fills them into its page of that name.
"""

import os
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
HEADER = (
    '| config | data | epochs | parameters | of these trained | our result |\n'
    '|---|---|--:|--:|--:|---|'
)


def model_zoo(page=ROOT / 'README.md'):
    """Return one heading and table per collection, as Markdown.

    Args:
        page (Path): The file whose relative links these are to be.
    """
    text = []
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text('utf-8'))
    for name in index['Import']:
        metafile = yaml.safe_load((ROOT / name).read_text('utf-8'))
        collections = {c['Name']: c for c in metafile['Collections']}
        for collection in collections.values():
            paper, readme = collection['Paper'], ROOT / collection['README']
            models = [
                m
                for m in metafile['Models']
                if m['In Collection'] == collection['Name']
            ]
            trained = sum('Results' in m for m in models)
            text += [
                f'## {collection["Name"]}',
                '',
                f'[{paper["Title"]}]({paper["URL"]}). '
                f'[Recipes, sizes, options]({relative(readme, page)}). '
                f'{len(models)} configs, {trained} of them trained here.',
                '',
                HEADER,
                *(row(m, collection, page) for m in models),
                '',
            ]
    return '\n'.join(text)


def row(model, collection, page):
    """Return a model's row of the table."""
    facts = {**collection.get('Metadata', {}), **model.get('Metadata', {})}
    return '| {} | {} | {} | {} | {} | {} |'.format(
        f'[{model["Name"]}]({relative(ROOT / model["Config"], page)})',
        facts.get('Training Data', '-'),
        facts.get('Epochs', '-'),
        millions(facts.get('Parameters')),
        millions(facts.get('Trained Parameters', facts.get('Parameters'))),
        '; '.join(map(result, model.get('Results', []))) or 'not trained',
    )


def result(entry):
    """Return one entry of ``Results`` in words."""
    figures = ', '.join(f'{k} {v}' for k, v in entry['Metrics'].items())
    return f'{figures} ({entry["Dataset"]})'


def millions(number):
    return f'{number / 1e6:.3f} M' if number else '-'


def relative(file, page):
    return Path(os.path.relpath(file, page.parent)).as_posix()


if __name__ == '__main__':
    print(model_zoo())
