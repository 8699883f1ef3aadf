"""What img2dataset 1.47 writes for each planted fault.

Per shard it writes `00000.tar` (jpg, txt and json of the successes), `00000_stats.json` and `00000.parquet` with a row
for every url, in the order in which they ended, not of their keys:

- the columns of `--save_additional_columns`, then caption (the list's column under that name), url, key;
- status: `success`, `failed_to_download` or `failed_to_resize`, and error_message, null for a success;
- width, height, original_width, original_height (int32), exif (JSON), sha256 of the bytes as they were fetched: null
  unless it is a success. With `--disable_all_reencoding` widths and heights are null, and nothing was decoded.

`00000_stats.json` has count, successes, failed_to_download, failed_to_resize, duration, start_time, end_time and
status_dict, a count by error text or "success". A shard that has one is never tried again. A sample at which
img2dataset's own code fails gets no row, so that count may exceed the other three. Only the last try's error is kept.
X-Robots-Tag counts in answers of 2xx alone: a 403 with it looks like any other. HTML cannot be told from a damaged
picture.
"""

from __future__ import annotations

_DOWNLOAD, _RESIZE = "failed_to_download", "failed_to_resize"
_CERTIFICATE = r"<urlopen error \[SSL: CERTIFICATE_VERIFY_FAILED\] certificate verify failed: {} \(_ssl\.c:\d+\)>"
_OPENCV = r"OpenCV\(\S+\) \S+: error: \(-215:Assertion failed\) {}\n"

ERRORS = {
    "http_401": (_DOWNLOAD, "HTTP Error 401: Unauthorized"),
    "http_403": (_DOWNLOAD, "HTTP Error 403: Forbidden"),
    "http_403_robots": (_DOWNLOAD, "HTTP Error 403: Forbidden"),
    "http_404": (_DOWNLOAD, "HTTP Error 404: Not Found"),
    "http_410": (_DOWNLOAD, "HTTP Error 410: Gone"),
    "http_429": (_DOWNLOAD, "HTTP Error 429: Too Many Requests"),
    "http_500": (_DOWNLOAD, "HTTP Error 500: Internal Server Error"),
    "http_503": (_DOWNLOAD, "HTTP Error 503: Service Unavailable"),
    "redirect_loop": (_DOWNLOAD, r"HTTP Error 302: .* infinite loop\.\nThe last 30x error message was:\nFound"),
    "robots": (_DOWNLOAD, "Use of image disallowed by X-Robots-Tag directive"),
    "timeout": (_DOWNLOAD, "timed out"),
    "timeout_body": (_DOWNLOAD, "timed out"),
    "timeout_connect": (_DOWNLOAD, "<urlopen error timed out>"),
    "refused": (_DOWNLOAD, r"<urlopen error \[Errno 111\] Connection refused>"),
    "no_such_host": (_DOWNLOAD, r"<urlopen error \[Errno -2\] Name or service not known>"),
    "resolver": (_DOWNLOAD, r"<urlopen error \[Errno -3\] Temporary failure in name resolution>"),
    "reset": (_DOWNLOAD, r"\[Errno 104\] Connection reset by peer"),
    "silent": (_DOWNLOAD, "Remote end closed connection without response"),
    "cut": (_DOWNLOAD, r"IncompleteRead\(\d+ bytes read, \d+ more expected\)"),
    "tls_plain": (_DOWNLOAD, r"<urlopen error \[SSL: \w+\] [\w ]+ \(_ssl\.c:\d+\)>"),
    "tls_expired": (_DOWNLOAD, _CERTIFICATE.format("certificate has expired")),
    "tls_self_signed": (_DOWNLOAD, _CERTIFICATE.format("self-signed certificate")),
    "tls_misnamed": (
        _DOWNLOAD,
        _CERTIFICATE.format(r"Hostname mismatch, certificate is not valid for 'misnamed\.example'\."),
    ),
    "url_space": (_DOWNLOAD, r"URL can't contain control characters\. .*"),
    "url_no_scheme": (_DOWNLOAD, "unknown url type: '//dogs.example/1.jpg'"),
    "url_no_host": (_DOWNLOAD, "<urlopen error no host given>"),
    "url_not_ascii": (_DOWNLOAD, "'ascii' codec can't encode character .*"),
    "url_port": (_DOWNLOAD, "nonnumeric port: 'oak'"),
    "corrupt": (_RESIZE, "Image decoding error"),
    "html": (_RESIZE, "Image decoding error"),
    "empty": (_RESIZE, _OPENCV.format(r"!buf\.empty\(\) in function 'imdecode_'")),
    "bomb": (_RESIZE, _OPENCV.format("pixels <= CV_IO_MAX_IMAGE_PIXELS in function 'validateInputImageSize'")),
    "too_small": (_RESIZE, "image too small"),
    "too_large": (_RESIZE, "image area too large"),
    "too_long": (_RESIZE, "aspect ratio too large"),
}
"""Fault -> (status, a regular expression for the whole error_message)."""
