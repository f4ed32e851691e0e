# How the images hang together. scripts/stack/images.py sets the variables and decides what is due.

variable "BASE_IMAGE" { default = "debian:trixie-slim" }
variable "CA_BUNDLE" { default = "/etc/ssl/certs/ca-certificates.crt" }
variable "APT_MIRROR" { default = "" }
variable "PIP_INDEX_URL" { default = "" }
variable "GOPROXY" { default = "" }
variable "DAGS_DIR" { default = "../dags" }

target "common" {
  args = {
    BASE_IMAGE    = BASE_IMAGE
    APT_MIRROR    = APT_MIRROR
    PIP_INDEX_URL = PIP_INDEX_URL
    GOPROXY       = GOPROXY
  }
  secret = ["id=ca,src=${CA_BUNDLE}"]
}

target "base" {
  inherits = ["common"]
  context  = "base"
  target   = "base"
}

target "python" {
  inherits = ["common"]
  context  = "base"
  target   = "python"
}

target "python-build" {
  inherits = ["common"]
  context  = "base"
  target   = "python-build"
}

target "postgres" {
  inherits = ["common"]
  context  = "postgres"
  contexts = { base = "target:base" }
}

target "redis" {
  inherits = ["common"]
  context  = "redis"
  contexts = { base = "target:base" }
}

target "minio" {
  inherits = ["common"]
  context  = "minio"
  target   = "minio"
  contexts = { base = "target:base", python = "target:python", python-build = "target:python-build" }
}

target "minio-init" {
  inherits = ["minio"]
  target   = "minio-init"
}

target "mlflow" {
  inherits = ["common"]
  context  = "mlflow"
  contexts = { python = "target:python", python-build = "target:python-build" }
}

target "serving" {
  inherits = ["common"]
  context  = "serving"
  contexts = { python = "target:python", python-build = "target:python-build" }
}

target "airflow" {
  inherits = ["common"]
  context  = "airflow"
  contexts = { python = "target:python", python-build = "target:python-build", dags = DAGS_DIR }
}
