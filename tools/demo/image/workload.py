"""What the demo's container runs: a small analysis, the way such images are used. It prints one line and ends."""

import io

import numpy
import pandas
import pyarrow.parquet
import scipy.stats
from matplotlib.figure import Figure
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import cross_val_score

rng = numpy.random.default_rng(7)
table = pandas.DataFrame(rng.normal(size=(400, 4)), columns=list("abcd"))
table["label"] = (table["a"] + table["b"] > 0).astype(int)

buffer = io.BytesIO()
pyarrow.parquet.write_table(pyarrow.Table.from_pandas(table), buffer)
table = pyarrow.parquet.read_table(io.BytesIO(buffer.getvalue())).to_pandas()

score = cross_val_score(RandomForestClassifier(n_estimators=10, random_state=7), table[list("abcd")], table["label"], cv=3).mean()
correlation = scipy.stats.pearsonr(table["a"], table["label"]).statistic
figure = Figure()
figure.subplots().scatter(table["a"], table["b"], c=table["label"])
picture = io.BytesIO()
figure.savefig(picture, format="png")

print(f"rows {len(table)}, accuracy {score:.3f}, correlation {correlation:.3f}, plot {len(picture.getvalue()) > 1000}", flush=True)
