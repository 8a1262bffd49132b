"""The packages that the training corpus is made of, at exact versions, and those held out.

Each is a wheel of the package index, permissively licensed by its own metadata, which
`mimo_jax.train.corpus` checks. Beside them stands the standard library of the Python that runs it.
"""

HELD_OUT = """
attrs==26.1.0 click==8.5.1 flask==3.1.3 jinja2==3.1.6 marshmallow==4.4.0 networkx==3.7
requests==2.34.2 tornado==6.6.1
""".split()
"""Whole packages that no training text is taken from; what others copied from them is removed."""

TRAINING = """
accelerate==1.15.0 aiohttp==3.14.5 alembic==1.20.1 angr==10.0.5 anyio==4.16.0
apache-airflow-core==3.3.2 apache-beam==2.77.0 arrow==1.4.0 astropy==8.0.2 babel==2.18.0
bandit==1.9.4 beartype==0.23.1 beautifulsoup4==4.15.0 black==26.10.1 blackjax==1.7.1 bokeh==3.10.1
boltons==26.2.0 boto3==1.44.5 botorch==0.18.1 bottle==0.13.4 cattrs==26.2.1 celery==5.7.0
certbot==5.8.0 cherrypy==18.10.0 chex==0.1.92 cinder==29.0.0 cirq-core==1.7.0 coverage==7.17.3
cryptography==50.0.2 cvxpy==1.9.3 cython==3.3.1 dagster==1.13.28 dask==2026.8.0 datasets==5.2.0
diffrax==0.7.2 diffusers==0.42.1 dipy==1.12.1 discord-py==2.7.1 distrax==0.1.9
distributed==2026.8.0 django==6.1.3 djangorestframework==3.18.3 dm-haiku==0.0.17 docker==7.2.0
dowhy==0.14 einops==0.8.2 equinox==0.13.8 eventlet==0.41.3 falcon==4.4.0 fastapi==0.163.2
flax==0.12.12 fsspec==2026.9.0 geopandas==1.2.0 gevent==26.9.0 gluonts==0.17.0 gpytorch==1.15.2
gradio==6.31.0 graphene==3.4.3 graphql-core==3.3.2 gunicorn==27.0.1 gymnasium==1.4.0 hatch==1.18.2
haystack-ai==3.4.1 holoviews==1.23.2 html5lib==1.1 httpx==0.28.1 huggingface-hub==2.4.0
ibis-framework==12.0.0 imbalanced-learn==0.14.2 invoke==3.0.3 ipython==9.18.1 isort==9.0.2
jax==0.12.0.1 jedi==0.20.1 joblib==1.6.0 jsonschema==4.26.0 jupyter-server==2.21.1 keras==3.15.1
kivy==2.3.1 kombu==5.7.0 kornia==0.9.0 langchain-community==0.4.2 langchain-core==1.8.1
lark==1.3.1 libcst==1.9.0 librosa==1.0.0 lifelines==0.30.3 llama-index-core==0.14.25 luigi==3.8.1
mako==1.4.3 manim==0.22.0 markdown-it-py==4.3.0 markdown==3.11.3 matplotlib==3.11.2 mesa==3.5.1
mistune==3.4.0 mlflow==3.18.0 mne==1.13.2 monai==1.6.1 mongoengine==0.29.3 more-itertools==11.2.1
moto==5.2.5 music21==10.5.1 mypy==2.4.1 nbconvert==7.17.2 neutron==29.0.0 nibabel==5.4.2
nilearn==0.14.1 nltk==3.10.4 nova==34.0.0 nox==2026.10.20 numba==0.68.1 numpy==2.5.5
numpyro==0.22.0 openfermion==1.8.1 openpyxl==3.1.5 optax==0.2.8 optuna==5.0.0
orbax-checkpoint==0.12.8 pandas==3.1.1 panel==1.10.0 parso==0.8.7 pdm==2.29.4 peft==0.21.2
pendulum==3.3.0 pennylane==0.45.1 poetry-core==2.5.0 poetry==2.5.1 prompt-toolkit==3.0.53
pydantic==2.14.3 pydicom==3.0.2 pygments==2.21.0 pymc==6.4.0 pymongo==4.20.0 pyod==3.6.7
pyomo==6.10.1 pyparsing==3.3.3 pypdf==7.1.0 pyqtgraph==0.14.0 pyramid==2.1 pyro-ppl==1.9.2
pytest==9.2.0 python-docx==1.2.0 python-pptx==1.0.2 pytorch-lightning==2.6.6 pyvista==0.49.1
qiskit==2.6.1 qutip==5.3.1 redis==8.1.0 reportlab==5.1.0 rich==15.0.0 river==0.26.1
robotframework==7.5 sanic==25.12.1 scanpy==1.12.4 scikit-image==0.26.0 scikit-learn==1.9.1
scipy==1.18.1 scrapy==2.19.0 seaborn==0.13.2 selenium==4.52.0 sentence-transformers==6.2.0
setuptools==84.2.1 sglang==0.5.23 sktime==1.2.0 spacy==3.8.18 sphinx==9.2.0 sqlalchemy==2.1.9
sqlfluff==4.5.0 sqlglot==30.30.0 sqlparse==0.6.1 stanza==1.15.0 starlette==1.10.0
statsmodels==0.15.0 strawberry-graphql==0.341.2 sunpy==8.0.1 swift==2.38.3 sympy==1.14.0
telethon==1.45.0 tensorboard==2.21.0 tensorflow-datasets==4.9.10 tensorflow-probability==0.25.0
textual==8.2.8 timm==1.0.31 toolz==1.2.0 torch-geometric==2.8.1 torchmetrics==1.9.0 tox==4.67.13
traitlets==5.16.1 traits==7.3.0 traitsui==8.0.0 transformers==5.23.0 trimesh==5.2.0 trio==0.35.0
trl==1.16.0 twisted==26.10.0 urllib3==2.8.0 uvicorn==0.54.0 vispy==0.17.0 vyper==0.4.3
wagtail==8.0.1 web3==8.0.0 werkzeug==3.1.9 xarray==2026.9.0 xlsxwriter==3.3.1 zarr==3.4.2
zodb==6.4
""".split()
"""Packages whose Python source is trained on, tests and vendored copies left out."""

ALLOWED_LICENCES = r"\bMIT\b|BSD|Apache|\bISC\b|Python Software Foundation|\bPSF|Zlib|CC0|\bZPL"
"""At least one of these stands in the metadata's licence (a search, whatever the case)."""

REFUSED_LICENCES = (
    r"\b[AL]?GPL|General Public|\bMPL|Mozilla|\bEPL|Eclipse|EUPL|CDDL|Proprietary|Commons Clause"
)
"""None of these stands there."""
