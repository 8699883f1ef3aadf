"""Settings of Spark for tiny data, where what plans and compiles queries costs more than what runs them."""

from __future__ import annotations

# Half of Java's time goes into compiling itself a second time, for programs that run for hours.
_JAVA = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"

TINY_SPARK = (
    f"spark.driver.extraJavaOptions={_JAVA}",
    f"spark.executor.extraJavaOptions={_JAVA}",
    "spark.sql.codegen.wholeStage=false",
    "spark.sql.adaptive.enabled=false",
)
