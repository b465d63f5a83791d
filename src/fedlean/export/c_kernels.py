"""The C that an exported model is made of: one function for each layer kind.

x is what a layer reads, y what it writes, both one example, row-major (C, H, W).  @WORDS@ are put
in by `fedlean.export.c`.
"""

from __future__ import annotations

HEAD = """\
/* A network trained by FedLean, for inference.  C99, no heap; link with -lm.
 *
 *   void @NAME@_run(const float *x, float *y);
 *
 * x: @INPUTS@ stored values (@SHAPE@), as the data set had them: they are normalised here.
 * y: @OUTPUTS@ outputs; the largest is the class, whose name is in @NAME@_classes.
 * Activations lie in one static block, so that one call runs at a time.
 * With -D@UPPER@_MAIN the file is a program: examples as text from stdin, outputs to stdout.
 */
#include <math.h>
#include <stdint.h>

enum { @UPPER@_INPUTS = @INPUTS@, @UPPER@_OUTPUTS = @OUTPUTS@ };
const char *const @NAME@_classes[@OUTPUTS@] = {@CLASSES@};
void @NAME@_run(const float *x, float *y);
static float memory[@MEMORY@];
"""

MAIN = """\
#ifdef @UPPER@_MAIN
#include <stdio.h>
int main(void) {
    static float x[@UPPER@_INPUTS], y[@UPPER@_OUTPUTS];
    for (int i = 0; scanf("%f", &x[i]) == 1;)
        if (++i == @UPPER@_INPUTS) {
            @NAME@_run(x, y);
            for (int k = 0; k < @UPPER@_OUTPUTS; k++)
                printf("%.9g%c", y[k], k + 1 < @UPPER@_OUTPUTS ? ' ' : '\\n');
            i = 0;
        }
    return 0;
}
#endif
"""

KERNELS = {
    "normalise": """\
static void normalise(const float *x, float *y, const float *factor, const float *shift,
                      int channels, int size) {
    for (int c = 0; c < channels; c++)
        for (int i = 0; i < size; i++, x++, y++) *y = *x * factor[c] - shift[c];
}
""",
    "linear": """\
static void linear(const float *x, float *y, const float *w, const float *bias, int rows,
                   int columns) {
    for (int r = 0; r < rows; r++) {
        float sum = bias ? bias[r] : 0.0f;
        for (int c = 0; c < columns; c++) sum += *w++ * x[c];
        y[r] = sum;
    }
}
""",
    "linear_sparse": """\
/* distance: columns without a weight before the next one; 255: so many, and it goes on */
static void linear_sparse(const float *x, float *y, const float *w, const uint8_t *distance,
                          const uint32_t *kept, const float *bias, int rows) {
    for (int r = 0; r < rows; r++) {
        float sum = bias ? bias[r] : 0.0f;
        const float *at = x;
        for (uint32_t k = 0; k < kept[r]; k++) {
            while (*distance == 255) at += *distance++;
            at += *distance++;
            sum += *w++ * *at++;
        }
        y[r] = sum;
    }
}
""",
    "conv": """\
/* distance 0: every weight is there; else as of a sparse linear layer, a row an output channel */
static void conv(const float *x, float *y, const float *w, const uint8_t *distance,
                 const uint32_t *kept, const float *bias, int c_in, int h, int width, int c_out,
                 int oh, int ow, int kh, int kw, int sh, int sw, int ph, int pw, int dh, int dw,
                 int groups) {
    int own = c_in / groups, area = kh * kw;
    for (int o = 0; o < c_out; o++, y += oh * ow) {
        const float *plane = x + o / (c_out / groups) * own * h * width;
        uint32_t count = distance ? kept[o] : (uint32_t)(own * area);
        int at = -1;
        for (int i = 0; i < oh * ow; i++) y[i] = bias ? bias[o] : 0.0f;
        for (uint32_t k = 0; k < count; k++) {
            at++;
            if (distance) {
                while (*distance == 255) at += *distance++;
                at += *distance++;
            }
            int row = at % area / kw * dh - ph, column = at % kw * dw - pw;
            const float *from = plane + at / area * h * width;
            float weight = *w++;
            int first = column >= 0 ? 0 : (-column + sw - 1) / sw;
            int last = column >= width ? 0 : (width - 1 - column) / sw + 1;
            if (last > ow) last = ow;
            for (int i = 0; i < oh; i++) {
                int r = i * sh + row;
                if (r < 0 || r >= h) continue;
                const float *line = from + r * width;
                float *out = y + i * ow;
                for (int j = first; j < last; j++) out[j] += weight * line[column + j * sw];
            }
        }
    }
}
""",
    "max_pool": """\
static void max_pool(const float *x, float *y, int c, int h, int w, int oh, int ow, int kh, int kw,
                     int sh, int sw, int ph, int pw) {
    for (int n = 0; n < c; n++, x += h * w)
        for (int i = 0; i < oh; i++)
            for (int j = 0; j < ow; j++) {
                float most = -INFINITY;
                for (int a = i * sh - ph; a < i * sh - ph + kh; a++)
                    for (int b = j * sw - pw; b < j * sw - pw + kw; b++)
                        if (a >= 0 && a < h && b >= 0 && b < w && x[a * w + b] > most)
                            most = x[a * w + b];
                *y++ = most;
            }
}
""",
    "average_pool": """\
static void average_pool(const float *x, float *y, int c, int h, int w, int oh, int ow, int kh,
                         int kw, int sh, int sw, int ph, int pw) {
    for (int n = 0; n < c; n++, x += h * w)
        for (int i = 0; i < oh; i++)
            for (int j = 0; j < ow; j++) {
                float sum = 0.0f;
                for (int a = i * sh - ph; a < i * sh - ph + kh; a++)
                    for (int b = j * sw - pw; b < j * sw - pw + kw; b++)
                        if (a >= 0 && a < h && b >= 0 && b < w) sum += x[a * w + b];
                *y++ = sum / (float)(kh * kw);
            }
}
""",
    "global_average": """\
static void global_average(const float *x, float *y, int channels, int size) {
    for (int c = 0; c < channels; c++) {
        float sum = 0.0f;
        for (int i = 0; i < size; i++) sum += *x++;
        y[c] = sum / (float)size;
    }
}
""",
    "group_norm": """\
static void group_norm(const float *x, float *y, const float *weight, const float *bias,
                       int channels, int size, int groups, float eps) {
    int own = channels / groups, count = own * size;
    for (int g = 0; g < groups; g++, x += count, y += count) {
        float mean = 0.0f, spread = 0.0f;
        for (int i = 0; i < count; i++) mean += x[i];
        mean /= (float)count;
        for (int i = 0; i < count; i++) spread += (x[i] - mean) * (x[i] - mean);
        float scale = 1.0f / sqrtf(spread / (float)count + eps);
        for (int i = 0; i < count; i++) {
            int c = g * own + i / size;
            y[i] = (x[i] - mean) * scale * weight[c] + bias[c];
        }
    }
}
""",
    "affine": """\
static void affine(const float *x, float *y, const float *factor, const float *shift, int channels,
                   int size) {
    for (int c = 0; c < channels; c++)
        for (int i = 0; i < size; i++, x++, y++) *y = *x * factor[c] + shift[c];
}
""",
    "relu": """\
static void relu(const float *x, float *y, int size) {
    for (int i = 0; i < size; i++) y[i] = x[i] > 0.0f ? x[i] : 0.0f;
}
""",
    "hardswish": """\
static void hardswish(const float *x, float *y, int size) {
    for (int i = 0; i < size; i++) y[i] = x[i] * fminf(fmaxf(x[i] + 3.0f, 0.0f), 6.0f) / 6.0f;
}
""",
    "hardsigmoid": """\
static void hardsigmoid(const float *x, float *y, int size) {
    for (int i = 0; i < size; i++) y[i] = fminf(fmaxf(x[i] + 3.0f, 0.0f), 6.0f) / 6.0f;
}
""",
    "leaky_relu": """\
static void leaky_relu(const float *x, float *y, int size, float slope) {
    for (int i = 0; i < size; i++) y[i] = x[i] > 0.0f ? x[i] : slope * x[i];
}
""",
    "hardtanh": """\
static void hardtanh(const float *x, float *y, int size, float low, float high) {
    for (int i = 0; i < size; i++) y[i] = fminf(fmaxf(x[i], low), high);
}
""",
    "sigmoid": """\
static void sigmoid(const float *x, float *y, int size) {
    for (int i = 0; i < size; i++) y[i] = 1.0f / (1.0f + expf(-x[i]));
}
""",
    "hyperbolic_tangent": """\
static void hyperbolic_tangent(const float *x, float *y, int size) {
    for (int i = 0; i < size; i++) y[i] = tanhf(x[i]);
}
""",
    "silu": """\
static void silu(const float *x, float *y, int size) {
    for (int i = 0; i < size; i++) y[i] = x[i] / (1.0f + expf(-x[i]));
}
""",
    "gelu": """\
static void gelu(const float *x, float *y, int size) {
    for (int i = 0; i < size; i++) y[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
}
""",
    "gelu_tanh": """\
static void gelu_tanh(const float *x, float *y, int size) {
    for (int i = 0; i < size; i++) {
        float inner = 0.79788456f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
        y[i] = 0.5f * x[i] * (1.0f + tanhf(inner));
    }
}
""",
    "copy": """\
static void copy(const float *x, float *y, int size) {
    for (int i = 0; i < size; i++) y[i] = x[i];
}
""",
    "add": """\
static void add(const float *x, const float *other, float *y, int size) {
    for (int i = 0; i < size; i++) y[i] = x[i] + other[i];
}
""",
    "scale": """\
static void scale(const float *x, const float *gate, float *y, int channels, int size) {
    for (int c = 0; c < channels; c++)
        for (int i = 0; i < size; i++) *y++ = *x++ * gate[c];
}
""",
}
