#pragma once

#include "cpu_attention.h"
#include "cpu_rows.h"

namespace leeway::LEEWAY_ISA {

const ModelKernels kModel = {
    {norm<double>, norm<float>},
    {norm_grad<double>, norm_grad<float>},
    {swiglu<double>, swiglu<float>},
    {swiglu_grad<double>, swiglu_grad<float>},
    {attention<double>, attention<float>},
    {attention_grad<double>, attention_grad<float>},
    {decode<double>, decode<float>},
};

}  // namespace leeway::LEEWAY_ISA
