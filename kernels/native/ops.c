/* The operators, and the one entry that ONNX Runtime calls when it loads the library. */
#include "abi.h"

extern struct mr_op mr_qlinear_op;   /* linear_op.c */
extern struct mr_op mr_linear_op;    /* linear_op.c */
extern struct mr_op mr_qembed_op;    /* embed_op.c */
extern struct mr_op mr_embed_op;     /* embed_op.c */
extern struct mr_op mr_attention_op; /* attention_op.c */
extern struct mr_op mr_sample_op;    /* sample_op.c */

static struct mr_op *const operators[] = {
    &mr_qlinear_op, &mr_linear_op, &mr_qembed_op, &mr_embed_op, &mr_attention_op, &mr_sample_op,
};

MR_EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base);

MR_EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    MR_TRY(mr_bind_api(base));
    return mr_register(options, operators, MR_COUNT(operators));
}
